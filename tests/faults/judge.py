"""What has to hold of a run that a fault befell. Each check returns what does not, in words; nothing where all does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_megatron.conversion.checkpoints.folder import read_checkpoint
from prism_megatron.errors import PrismError
from tests.faults.draw import Fault

Rows = Sequence[Mapping[str, Any]]

_VISIBLE = re.compile(r"step_\d{6}$")
_SET_ASIDE = re.compile(r"damaged-step_\d{6}$")
_HIDDEN = re.compile(r"\.step_\d{6}\.(saving|replaced|removed)$")
_HALF = re.compile(r"\.(step_\d+\..*|hf\..*|.*\.part)$")
_SAID = re.compile(r"^error: |^rank \d+ (was ended by SIG|ended with status )", re.MULTILINE)
_FULL = re.compile(r"^error: .*no space left on device", re.MULTILINE | re.IGNORECASE)
_HEADER_BYTES = 8
"""Of a safetensors file: how long the description of its tensors is."""


def differing_rows(rows: Rows, expected: Rows) -> list[str]:
    """Rows that are not, to the bit, those of the run that was left alone."""
    found = [] if len(rows) == len(expected) else [f"{len(rows)} rows instead of {len(expected)}"]
    for number, (row, wanted) in enumerate(zip(rows, expected, strict=False)):
        names = [name for name in {**row, **wanted} if row.get(name, "absent") != wanted.get(name, "absent")]
        found += [f"row {number}: {name} is {row.get(name)!r}, not {wanted.get(name)!r}" for name in names[:3]]
    return found


def inconsistent_rows(rows: Rows, expected: Rows) -> list[str]:
    """Rows of a run with servers that make no whole: steps once and in order, versions that follow, finite figures.

    ``expected`` are those of a run that was left alone, for their number and the names in them.
    """
    found = []
    if [row["step"] for row in rows] != list(range(len(expected))):
        found.append(f"steps are {[row['step'] for row in rows]}, not 0 to {len(expected) - 1}")
    for row, wanted in zip(rows, expected, strict=False):
        where = f"step {row['step']}"
        if missing := wanted.keys() ^ row.keys():
            found.append(f"{where}: {sorted(missing)} stand in one of the runs alone")
        found += [
            f"{where}: {name} is {value}"
            for name, value in row.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if row["sampled_version"] != row["step"] or row["policy_version"] < row["sampled_version"]:
            found.append(f"{where}: sampled by {row['sampled_version']}, now {row['policy_version']}")
        if row["rollouts"] != wanted["rollouts"]:
            found.append(f"{where}: {row['rollouts']} rollouts instead of {wanted['rollouts']}")
    return found


def differing_results(results: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Files that are not, to the byte, what the run that was left alone made."""
    return [
        f"{name} differs, or is there in one of the runs alone"
        for name in sorted({*results, *expected})
        if results.get(name) != expected.get(name)
    ]


def torn(output: Path) -> list[str]:
    """What stands under a final name and is not whole: checkpoints, exported weights, JSON files."""
    found = []
    for root in output.rglob("checkpoints"):
        for folder in root.iterdir():
            if _VISIBLE.match(folder.name):
                try:
                    read_checkpoint(folder)
                except PrismError as error:
                    found.append(str(error))
            elif not (_HIDDEN.match(folder.name) or _SET_ASIDE.match(folder.name)):
                found.append(f"{folder} has a name that nobody knows")
    found += [
        f"{path} is cut short"
        for path in output.rglob("hf/*.safetensors")
        if (path.parent / "config.json").is_file() and not _is_whole(path)
    ]
    for name in ("summary.json", "report.json", "run.json", "state.json", "pipeline.json"):
        found += [f"{path} is no JSON" for path in output.rglob(name) if not _is_json(path)]
    return found


def leftovers(output: Path) -> list[str]:
    """What a run at its end has not cleaned away of what a killed try had half written."""
    halves = [path for path in output.rglob(".*") if _HALF.match(path.name)]
    return [f"{path} was left" for path in halves if not any(part.startswith("earlier-") for part in path.parts)]


def ill_said(fault: Fault, victim: str | None, status: int, errors: str, *, torchrun: bool) -> list[str]:
    """A failure that was not told as the product promises: one line, without a traceback, and for a full disk its own.

    A command that was itself killed says nothing, and torchrun adds a report of its own.
    """
    if status == 0 or status < 0 or victim == "everything":
        return []
    found = []
    line = _FULL if fault == "disk" else _SAID
    if not line.search(errors) and not torchrun:
        found.append(f"status {status} without the line that says why: {errors[-300:]!r}")
    if "Traceback" in errors and not torchrun:
        found.append(f"a traceback: {errors[-300:]!r}")
    if fault == "disk" and status != PrismError.status and not torchrun:
        found.append(f"a full disk ended with status {status}")
    return found


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file has all the bytes that its header names."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    last = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return path.stat().st_size == _HEADER_BYTES + length + int(last)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
