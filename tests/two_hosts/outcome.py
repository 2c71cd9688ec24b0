"""What a run has left behind: rows to compare, and files that must not be there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prism_megatron.conversion.checkpoints.folder import read_checkpoint
from prism_megatron.errors import PrismError
from prism_megatron.observability.metrics import read_metrics

CLOCKS = ("seconds/", "memory/", "time")
"""Figures of the machine; all others are the run's and must be the same to the bit."""


def rows_of(output: Path) -> list[dict[str, Any]]:
    """What every step came to, without the machine's figures."""
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCKS)}
        for row in read_metrics(output / "metrics.jsonl")
    ]


def export_of(output: Path) -> str:
    """The digest of the policy's weights that the run ended with."""
    return hashlib.sha256((output / "hf" / "model.safetensors").read_bytes()).hexdigest()


def differences(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> list[str]:
    """Where two runs' rows differ, in words; nothing where they are the same to the bit."""
    if [row["step"] for row in mine] != [row["step"] for row in theirs]:
        return [f"steps {[row['step'] for row in mine]} beside {[row['step'] for row in theirs]}"]
    return [
        f"step {one['step']}: {name} is {one.get(name)} and {other.get(name)}"
        for one, other in zip(mine, theirs, strict=True)
        for name in sorted({*one, *other})
        if json.dumps(one.get(name)) != json.dumps(other.get(name))
    ]


def torn(output: Path) -> list[str]:
    """What stands under a final name and is not whole; hidden names are those of work under way."""
    found = []
    for folder in _visible(output / "checkpoints"):
        try:
            read_checkpoint(folder)
        except (PrismError, OSError) as error:
            found.append(f"{folder.name}: {error}")
    for path in _visible(output):
        if path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                found.append(f"{path.name}: {error}")
    export = output / "hf"
    if export.is_dir():
        found.append("an export of a run that has not ended")
    try:
        rows_of(output)
    except (PrismError, OSError) as error:
        found.append(f"metrics.jsonl: {error}")
    return found


def error_line(said: str) -> str | None:
    """The first line that a command ends with, if it is there before any traceback."""
    lines: Iterable[str] = said.partition("Traceback (most recent call last)")[0].splitlines()
    return next((line for line in lines if line.startswith("error: ")), None)


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
