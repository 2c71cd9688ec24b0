"""``metrics.jsonl``: one JSON object a line, one line a step. A metric without data is null, never a number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_megatron.disk import write_atomically
from prism_megatron.errors import DataError

Value = float | int | str | None
Row = Mapping[str, Value]


class MetricsWriter:
    """Appends rows; each is on disk when ``write`` returns, so a killed run keeps every finished step.

    One process may write a file at a time (the main rank).
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open ``path`` for a run that begins at ``first_step`` (0, or the step after a loaded checkpoint).

        Rows of that step and later ones, left by a run that was killed after its checkpoint, are dropped: those steps
        are played again. So is a last line that was cut short.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] < first_step] if path.exists() else []
        write_atomically(path, "".join(_line(row) for row in kept))
        self._next_step = first_step
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append one step. Raises ValueError for a step that does not follow the last one."""
        step = row.get("step")
        if not isinstance(step, int) or step < self._next_step:
            raise ValueError(f"metrics row has step {step!r}; expected an integer of at least {self._next_step}")
        self._file.write(_line(row))
        self._file.flush()
        self._next_step = step + 1

    def close(self) -> None:
        """Close the file; rows are already on disk."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows in order. A last line without its newline (a write cut by a kill) is left out.

    Raises DataError for any other line that is not a JSON object with an integer ``step``.
    """
    lines = path.read_bytes().split(b"\n")
    return [parse_row(line, where=f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1)]


def parse_row(line: bytes, *, where: str) -> dict[str, Any]:
    """One line of the file. Raises DataError, which names ``where``, unless it is an object with an integer step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); remove the line or the file") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise DataError(f"{where}: not an object with an integer 'step'; remove the line or the file")
    return row


def to_json(value: object, *, indent: int | None = None) -> str:
    """Strict JSON. NaN and infinities, which it does not have, become null."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _line(row: Row) -> str:
    return to_json(dict(row)) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
