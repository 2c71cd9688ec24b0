"""A cache of the hub as ``huggingface_hub`` leaves it, made by hand: no network is needed to read from it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(cache: Path, repository: str, files: Path, *, revision: str = "main", commit: str = COMMIT) -> Path:
    """Put a folder's files in under ``repository``; returns the snapshot, whose files are links to blobs."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", snapshot, (root / "refs" / revision).parent):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for path in sorted(files.iterdir()):
        content = path.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def use(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Have this process read ``cache`` and nothing else: the variables are read when the library is imported."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
