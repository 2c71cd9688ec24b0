"""``run.json``: what is known of a run beside its rows, from its first step on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prism_megatron.disk import write_atomically
from prism_megatron.errors import DataError
from prism_megatron.observability.metrics import to_json


@dataclass(frozen=True)
class RunRecord:
    """One run, also over the commands that went on with it: ``id`` and ``created`` are those of the first."""

    id: str
    """32 hexadecimal digits that no other run has"""
    stage: str
    """as the stage calls itself"""
    title: str
    """what the run is, in words"""
    created: str
    """when the first step began, ISO 8601 in UTC"""
    total_steps: int
    world_size: int
    layout: Mapping[str, int]
    """sizes of tp, pp, cp, dp and ep"""
    versions: Mapping[str, str]
    """of the packages that compute"""
    data: Mapping[str, int] = field(default_factory=dict)
    """lines of its data, how many are kept, and how many are left out for each reason; empty where all is made"""


_FIELDS: Mapping[str, type] = {
    "id": str,
    "stage": str,
    "title": str,
    "created": str,
    "total_steps": int,
    "world_size": int,
    "layout": dict,
    "versions": dict,
}


def write_record(path: Path, record: RunRecord) -> None:
    """Write it in one rename."""
    write_atomically(path, to_json(asdict(record), indent=2) + "\n")


def read_record(path: Path) -> RunRecord | None:
    """What :func:`write_record` wrote; None where there is no such file. Raises DataError for a damaged one."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(document, dict):
        raise _damaged(path, "it holds no object")
    for name, kind in _FIELDS.items():
        if type(document.get(name)) is not kind:
            raise _damaged(path, f"{name} is {document.get(name)!r}")
    if not all(type(size) is int for size in document["layout"].values()):
        raise _damaged(path, f"layout is {document['layout']!r}")
    data = document.get("data", {})  # of an earlier version, which did not note it
    if not isinstance(data, dict) or not all(type(count) is int for count in data.values()):
        raise _damaged(path, f"data is {data!r}")
    return RunRecord(**{name: document[name] for name in _FIELDS}, data=data)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is damaged ({why}); remove it, and a run that goes on writes it anew")
