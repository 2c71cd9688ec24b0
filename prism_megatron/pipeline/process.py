"""A step's command as a process below this one: it dies with it, and hears the signals that this one is sent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from prism_megatron.engine.launch import die_with_parent
from prism_megatron.errors import RunStopped

_PACKAGES = Path(__file__).resolve().parents[2]
_ECHO_SECONDS = 1.0
"""As in ``run/ending/stopping.py``: a Ctrl-C that comes twice within this time came once."""


class Processes:
    """Runs commands, one after the other. Use it as a context manager: inside, a signal is passed on to the command.

    The first asks it to end after what it is doing; a later one is passed on too, and ends it at once.
    """

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None
        self._since = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, words: Sequence[str]) -> int:
        """The command's exit status, negative where a signal ended it. Raises OSError for one that cannot be started,
        RunStopped, without starting it, where a signal was heard."""
        self.raise_if_asked("before it began")
        environment = {
            **os.environ,
            # A command finds this very package, and a launcher such as torchrun that lies beside this Python.
            "PYTHONPATH": _with(_PACKAGES, os.environ.get("PYTHONPATH", "")),
            "PATH": _with(Path(sys.executable).parent, os.environ.get("PATH", os.defpath)),
        }
        self._process = subprocess.Popen(
            words,
            env=environment,
            # What the kernel is asked for here outlives the exec. Threads of libraries, if there are any, rest.
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  # it allocates nothing that they hold
        )
        try:
            if self.heard is not None:  # between the look above and now
                self._process.terminate()
            return self._process.wait()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process = None

    def raise_if_asked(self, where: str) -> None:
        """Raises RunStopped where a signal was heard."""
        if self.heard is not None:
            raise RunStopped(f"stopped by {self.heard.name} {where}; the same command with --resume auto goes on")

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.heard is not None and now - self._since < _ECHO_SECONDS:
            return
        self.heard, self._since = self.heard or signal.Signals(number), now
        if self._process is not None:
            # The terminal's Ctrl-C has reached the command too, which takes both for one.
            self._process.send_signal(signal.SIGTERM)


def _with(folder: Path, path: str) -> str:
    return str(folder) if not path else f"{folder}{os.pathsep}{path}"
