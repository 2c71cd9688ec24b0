"""The paper's three stages as runs of any policy, and the fewest GPUs that take each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_megatron.config.presets import preset
from prism_megatron.planning.build import CONFIGS, Run, StageName
from prism_megatron.planning.floors import step_floor
from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.layouts import Candidate, candidates, confirmed
from prism_megatron.planning.work import phases_of

STAGES: tuple[StageName, ...] = ("sft", "align", "rlvr")
JUDGE = "2B"
"""What the paper's discriminator is made of, for every policy."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Hours:
    """Of a whole stage, at the floors of its steps, and where steps reach a share of the roofs only."""

    steps: int
    step_seconds: float
    share: float
    gpus: int

    @property
    def floor(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def likely(self) -> float:
        return self.floor / self.share

    @property
    def gpu_hours(self) -> float:
        return self.likely * self.gpus


@dataclass(frozen=True)
class Smallest:
    """The fewest GPUs of a stage. ``below`` says why half as many do not do."""

    model: str
    stage: StageName
    gpus: int
    candidate: Candidate
    below: str


def paper_run(stage: StageName, model: str, *, gpus: int, judge: str = JUDGE) -> Run:
    """A stage with the paper's settings, which are the fields' defaults. Raises ConfigError for an unknown size."""
    return Run(stage, CONFIGS[stage](), preset(model), gpus, judge=preset(judge) if stage == "align" else None)


def hours_of(run: Run, gpu: Gpu, *, share: float) -> Hours:
    """All steps of the run."""
    return Hours(run.steps, step_floor(phases_of(run, gpu), gpu), share, run.world_size)


def smallest(
    model: str, stage: StageName, gpu: Gpu, *, say: Callable[[str], None], play: bool = True, judge: str = JUDGE
) -> Smallest | None:
    """The smallest number of GPUs, a power of two, one layout of which fits; None for none.

    With ``play`` it fits when its step is played, otherwise by arithmetic.
    """
    below = "there is no smaller one"
    for gpus in COUNTS:
        found = candidates(paper_run(stage, model, gpus=gpus, judge=judge), gpu)
        played: Sequence[Candidate] = confirmed(found, gpu, wanted=1) if play else ()
        fitting = [one for one in (played if play else found) if one.fits]
        say(f"{model} {stage} on {gpus}: {len(played)} of {len(found)} layouts played, {len(fitting)} fit")
        if fitting:
            return Smallest(model, stage, gpus, fitting[0], below)
        below = f"{gpus}: {closest(played or found)}"
    return None


def closest(found: Sequence[Candidate]) -> str:
    """Why the layout that is nearest to fitting does not fit."""
    known = [one for one in found if one.memory is not None]
    if not known:
        return found[0].reason if found else "no layout"
    best = min(known, key=lambda one: one.memory.worst if one.memory else 0.0)
    return f"{best.layout.as_flags()}: {best.reason}"
