"""Saved states of Energon's loader: of how many ranks and workers they are, read without running what they hold.

Energon restores a state at another number of ranks and loses samples without a word, or fails in its workers. Our own
loader never reads these states: it keeps its own, which is the same for every number of ranks and workers.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from prism_megatron.errors import DataError

_RANK_STATE = "SavableDataLoaderState"
_MAX_BYTES = 2**28


@dataclass(frozen=True)
class EnergonState:
    """Of how many data-parallel ranks, and of how many workers each."""

    ranks: int
    workers: int


def refuse_other_layout(path: Path, *, ranks: int, workers: int) -> EnergonState:
    """What the state at ``path`` is of. Raises DataError if that is another layout, or if it is no such state."""
    state = energon_state(path)
    if (state.ranks, state.workers) != (ranks, workers):
        raise DataError(
            f"{path} is a state of Energon's loader at {state.ranks} ranks with {state.workers} workers each, not at "
            f"{ranks} with {workers}: Energon would lose samples; go on at {state.ranks} and {state.workers}, or where "
            f"ranks times workers stay {state.ranks * state.workers}, run energon checkpoint redist first"
        )
    return state


def energon_state(path: Path) -> EnergonState:
    """A folder with a file for every rank, or one file. Raises DataError for anything else."""
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .pt file; name the folder that Energon's states were saved in")
    workers: list[int] = []
    for file in files:
        workers += _workers_by_rank(file)
    if len(set(workers)) != 1:
        raise DataError(f"{path}: ranks have {sorted(set(workers))} workers; they must have equally many")
    return EnergonState(len(workers), workers[0])


class _Inert:
    """Stands for every class that a pickle names. It keeps what it was given, and does nothing."""

    name = ""
    named: dict[str, Any]

    def __new__(cls, *_arguments: Any, **named: Any) -> Self:
        """Here and not in ``__init__``, which pickles do not call."""
        self = super().__new__(cls)
        self.named = named
        return self

    def __setstate__(self, state: Any) -> None:
        values = state if isinstance(state, dict) else (state[-1] if isinstance(state, tuple) and state else {})
        if isinstance(values, dict):
            self.named |= values

    def append(self, _value: Any) -> None:
        """Lists of unknown kinds are not looked at."""

    def extend(self, _values: Any) -> None:
        """As ``append``."""

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """As ``append``, for dictionaries of unknown kinds."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, _module: str, name: str) -> type[_Inert]:
        return type(name, (_Inert,), {"name": name})

    def persistent_load(self, _pid: Any) -> None:
        """Tensors are not looked at."""


def _workers_by_rank(file: Path) -> list[int]:
    try:
        with zipfile.ZipFile(file) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if archive.getinfo(member).file_size > _MAX_BYTES:
                raise DataError(f"{file}: too large for a state of Energon's loader")
            value = _InertUnpickler(io.BytesIO(archive.read(member))).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may make of its opcodes any error there is
        raise DataError(f"{file} is no state of Energon's loader: {' '.join(str(error).split())[:200]}") from error
    if isinstance(value, dict):
        value = value.get("dataloader_state_dict")  # as Megatron saves it
    counts = []
    for state in value if isinstance(value, list) else [value]:
        found = state.named.get("worker_states") if isinstance(state, _Inert) and state.name == _RANK_STATE else None
        if not isinstance(found, list) or not found:
            raise DataError(f"{file} is no state of Energon's loader")
        counts.append(len(found))
    if not counts:
        raise DataError(f"{file} is no state of Energon's loader")
    return counts
