"""A wall clock that jumps, for a trial's processes alone: ``sitecustomize`` replaces ``time.time``, the host's is left.

Blind spot: ``datetime.now`` and code in C, which ask the kernel.
"""

from __future__ import annotations

from pathlib import Path

FILE = "FAULTS_CLOCK"
"""Names the file that says by how many seconds the clock is wrong; there is none until it jumps."""
JUMP_SECONDS = 3600.0
_SHIM = f"""
import os, time

_now, _path = time.time, os.environ["{FILE}"]


def _wrong():
    try:
        with open(_path) as file:
            return float(file.read() or 0)
    except OSError:
        return 0.0


time.time = lambda: _now() + _wrong()
time.time_ns = lambda: int(time.time() * 1e9)
"""


def shim(folder: Path) -> Path:
    """A folder for PYTHONPATH that makes interpreters read their clock so."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SHIM)
    return folder


def jump(file: Path, *, forward: bool) -> None:
    """Put the clock of those that read ``file`` an hour forward, or back."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(str(JUMP_SECONDS if forward else -JUMP_SECONDS))
    new.rename(file)
