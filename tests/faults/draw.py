"""What a trial does, drawn from its seed: ``7-42`` is the 42nd trial of the campaign with seed 7."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any, Literal

Fault = Literal["kill", "power", "damage", "disk", "clock"]
Rollout = Literal["embedded", "served"]

STAGES = {"sft": 3, "warm-start": 2, "align": 4, "rlvr": 4, "pipeline": 1, "evaluate": 1, "select": 1}
"""How often each is drawn, beside the others."""
FAULTS: dict[Fault, int] = {"kill": 6, "power": 2, "damage": 2, "disk": 2, "clock": 1}
SERVED = ("align", "rlvr")
"""Stages that are drawn with servers in half of the trials."""
SAVING = ("sft", "warm-start", "align", "rlvr")
"""Stages that write checkpoints, of which the newest can be damaged."""
ONE_RANK = ("pipeline",)
ROLES = ("rank", "launcher", "fork server", "resource tracker", "loader worker", "reward supervisor", "reward worker",
         "server", "pipeline", "other")  # fmt: skip
"""What a process of a run can be (``processes.py``)."""


@dataclass(frozen=True)
class Setting:
    """What is played: trials with equal ones end in equal rows."""

    stage: str
    ranks: int = 1
    rollout: Rollout = "embedded"


@dataclass(frozen=True)
class Trial:
    """One fault in one run. Shares are at least 0 and below 1."""

    seed: str
    setting: Setting
    torchrun: bool
    """whether torchrun starts the ranks, and not the command itself"""
    fault: Fault
    place: float
    """share of the run's landmarks after which the fault comes (``watch.py``)"""
    delay: float
    """share of the usual time from there to the next landmark that passes first"""
    roles: tuple[str, ...]
    """in which order processes are looked for; the first role that is there loses one"""
    member: float
    """which of the role's processes, of all there are"""
    choice: float
    """which file of a checkpoint is cut, and where a clock is put: forward or back"""
    share: float
    """of a file that is cut, what is left"""

    def to_plain(self) -> dict[str, Any]:
        """As a line of the campaign's log has it."""
        plain = asdict(self)
        return {"seed": plain.pop("seed"), **plain.pop("setting"), **plain}


def draw(seed: str, *, may_mount: bool) -> Trial:
    """The trial of that seed. Where no file system may be mounted, another fault stands for a full disk."""
    rng = random.Random(seed)
    stage = _one_of(rng, STAGES)
    ranks = 1 if rng.random() < 0.5 or stage in ONE_RANK else 2
    served = rng.random() < 0.5 and stage in SERVED
    torchrun = rng.random() < 0.3 and ranks > 1
    fault = _one_of(rng, FAULTS)
    if fault == "damage" and stage not in SAVING:
        fault = "power"
    if fault == "disk" and not may_mount:
        fault = "kill"
    roles = tuple(rng.sample(ROLES, len(ROLES)))
    place, delay, member, choice, share = (rng.random() for _ in range(5))
    setting = Setting(stage, ranks, "served" if served else "embedded")
    return Trial(seed, setting, torchrun, fault, place, delay, roles, member, choice, share)


def _one_of(rng: random.Random, weights: dict[Any, int]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]
