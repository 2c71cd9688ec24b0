"""What a pipeline's folder knows of its steps: which were begun and which are done, as what."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prism_megatron.config.json_file import read_object
from prism_megatron.disk import write_atomically, writing
from prism_megatron.errors import DataError
from prism_megatron.pipeline.identity import Identity

STATE = "pipeline.json"


@dataclass(frozen=True)
class Record:
    """One step as it was begun. ``seconds`` are those of the commands that came to an end."""

    work: str
    result: str
    done: bool = False
    seconds: float = 0.0

    @property
    def identity(self) -> Identity:
        return Identity(self.work, self.result)


class State:
    """The records of a folder by the key of their step. What is changed is on the disk, whole, before it counts."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a damaged file."""
        self._path = folder / STATE
        self.records: dict[str, Record] = {}
        if not self._path.exists():
            return
        document = read_object(self._path, error=DataError)
        try:
            self.records = {key: Record(**values) for key, values in document.items()}
        except TypeError as error:
            raise DataError(f"{self._path} is damaged ({error}); begin in another --output") from error

    def begin(self, key: str, identity: Identity) -> None:
        """Note that the step is under way. Raises DiskError."""
        before = self.records.get(key)
        seconds = 0.0 if before is None or before.work != identity.work else before.seconds
        self._put(key, Record(identity.work, identity.result, seconds=seconds))

    def end(self, key: str, *, seconds: float, done: bool) -> None:
        """Note that a command for it has ended after so many seconds. Raises DiskError."""
        before = self.records[key]
        self._put(key, replace(before, done=done, seconds=before.seconds + seconds))

    def forget(self, key: str) -> None:
        """Note that nobody knows what the step's folder holds. Raises DiskError."""
        if self.records.pop(key, None) is not None:
            self._write()

    def _put(self, key: str, record: Record) -> None:
        self.records[key] = record
        self._write()

    def _write(self) -> None:
        with writing(self._path):
            document = {name: asdict(one) for name, one in self.records.items()}
            write_atomically(self._path, f"{json.dumps(document, indent=1)}\n")
