"""Where temporary files go whose paths may not be long: sockets of this host take 107 bytes at most."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from prism_megatron.errors import ConfigError

LONGEST = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes of a folder in which Python's fork server has room for its socket, ``pymp-*/listener-*``, and SGLang too."""
_SHORT = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


def folder_for_sockets() -> Path:
    """The folder of temporary files where its name leaves room for a socket's, else a short one of this host's.

    Whoever makes a folder or a file there makes it with ``tempfile``, for its owner alone. Raises ConfigError, naming
    TMPDIR, where there is none.
    """
    asked = temporary_folder()
    if len(os.fsencode(asked)) <= LONGEST:
        return asked
    for folder in _SHORT:
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError(
        f"TMPDIR {asked} is too long for the sockets of ranks ({len(os.fsencode(asked))} bytes of {LONGEST}), and "
        f"{', '.join(map(str, _SHORT))} cannot be written; set TMPDIR to a shorter folder"
    )


def temporary_folder() -> Path:
    """The folder of temporary files. Raises ConfigError, naming TMPDIR, where no folder takes any."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        tried = os.environ.get("TMPDIR", "/tmp")
        raise ConfigError(
            f"TMPDIR {tried} takes no temporary files, and no usual folder does; set TMPDIR to a folder with room that "
            "can be written"
        ) from error
