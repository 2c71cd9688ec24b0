"""How often each prompt was answered right: a file that grows by a batch of prompts at a time, and outlives a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from prism_megatron.data.reading.fields import check_text, object_of
from prism_megatron.disk import writing
from prism_megatron.errors import DataError
from prism_megatron.rewards.rewarder import Rewarded
from prism_megatron.types import RolloutGroup

PASS_RATES = "pass_rates.jsonl"
_ELSEWHERE = "begin in another --output"


@dataclass(frozen=True)
class PassRate:
    """What became of one prompt. Example: ``PassRate("q-1", passes=3, rollouts=16, format=15, tokens=2048)``."""

    id: str
    passes: int
    """answers that are right, in the form that they have to have where that is asked for"""
    rollouts: int
    """answers"""
    format: int
    """answers in the asked form, right or wrong"""
    tokens: int
    """of all answers"""

    @property
    def share(self) -> float:
        """The pass rate."""
        return self.passes / self.rollouts


def pass_rate_of(group: RolloutGroup, rewards: Sequence[Rewarded]) -> PassRate:
    """Of the answers to one prompt, counted as ``prism-rlvr`` counts them."""
    return PassRate(
        group.prompt.id,
        passes=sum(one.reward.answer > 0 for one in rewards),
        rollouts=len(rewards),
        format=sum(one.read.valid for one in rewards),
        tokens=sum(len(rollout.token_ids) for rollout in group.rollouts),
    )


@dataclass(frozen=True)
class PassRateFile:
    """The lines of prompts ``ids``, in this order, that are answered ``batch_size`` at a time."""

    path: Path
    ids: Sequence[str]
    batch_size: int

    def reopen(self) -> list[PassRate]:
        """What whole batches have, after the rest was cut off: a kill may have left a part of a line or of a batch.

        Raises DataError for a whole line that is not of these prompts, DiskError where the file cannot be cut.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last end of a line is a part of one
        found = [self._read(line, number) for number, line in enumerate(lines)]
        if len(found) < len(self.ids):
            del found[len(found) - len(found) % self.batch_size :]
        with writing(self.path), self.path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[: len(found)]))
            os.fsync(file.fileno())
        return found

    def append(self, rates: Sequence[PassRate]) -> None:
        """Add a batch; once this returns it is on the disk. Raises DiskError where it cannot be."""
        text = "".join(f"{json.dumps(asdict(rate))}\n" for rate in rates)
        with writing(self.path), self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self, line: bytes, number: int) -> PassRate:
        where = f"{self.path}:{number + 1}"
        names = [one.name for one in fields(PassRate)]
        values = object_of(line, names, where)
        check_text(values["id"], "id", where)
        for name in names[1:]:
            if type(values[name]) is not int or values[name] < 0:
                raise DataError(f"{where}: field {name}: a count expected; {_ELSEWHERE}")
        if number >= len(self.ids) or values["id"] != self.ids[number]:
            raise DataError(f"{where}: field id: {values['id']!r} is not the prompt of its place; {_ELSEWHERE}")
        return PassRate(**values)
