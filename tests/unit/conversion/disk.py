"""What a power cut would find: flushes and renames, as they come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``flush PATH`` and ``rename PATH to PATH``, of all that happens from now on."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(handle: int) -> None:
        calls.append(f"flush {Path(f'/proc/self/fd/{handle}').readlink()}")
        fsync(handle)

    def recorded_rename(path: Path, to: Path) -> Path:
        calls.append(f"rename {path} to {to}")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    return calls
