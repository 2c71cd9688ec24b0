"""What this process holds of host memory, told by Linux, on an allocator that gives back what it does not use.

Example::

    settle()
    before = resident()
    forget_peak()
    ...
    print(peak_resident() - before)
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names for mallopt: what is kept on top of the heap, and from which size on a block is mapped by itself."""
_LEAST_MAPPED = 64 * 2**10


def give_back() -> None:
    """Let glibc map every block from 64 KiB on by itself, so that freeing one frees its pages, for good."""
    libc = ctypes.CDLL(None)
    assert libc.mallopt(_MMAP_THRESHOLD, _LEAST_MAPPED)
    assert libc.mallopt(_TRIM_THRESHOLD, _LEAST_MAPPED)


def settle() -> None:
    """Collect garbage, and hand the pages of free blocks back to Linux."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes that are resident now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Most bytes that were resident at a time since ``forget_peak``."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
