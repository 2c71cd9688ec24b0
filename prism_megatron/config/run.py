"""How a run is kept, stopped and watched: none of it changes what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.fields import AT_LEAST_ONE, POSITIVE, ZERO_IS_OFF, OnResume

Sink = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class RunConfig:
    """Going on, ending and being watched."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    resume: Annotated[Literal["no", "auto"], OnResume.COMMAND] = "no"
    """auto: one command line is the first and every later try; it goes on from the newest checkpoint in --output, and
    starts where there is none, with older rows kept aside"""
    change: Annotated[tuple[str, ...], OnResume.COMMAND] = ()
    """flags, without their dashes, that may differ from those the run was started with although they change what is
    trained, such as policy.lr, or data for records that are not the same any more"""
    max_minutes: Annotated[float | None, POSITIVE, OnResume.COMMAND] = None
    """save and end after the step in which so many minutes have passed since the command began; --load goes on"""
    max_idle_steps: Annotated[int, ZERO_IS_OFF] = 20
    """end the run after so many steps on end that ought to have trained a role and did not; 0 never does"""
    manual_gc: Annotated[int, ZERO_IS_OFF] = 0
    """collect Python's garbage every so many steps, on all ranks at once, and never between; 0 leaves it to Python"""
    report_every: Annotated[int, AT_LEAST_ONE] = 10
    """steps between updates of summary.json and report.html, which are also written at any end"""
    log_to: tuple[Sink, ...] = ()
    """where rows go beside metrics.jsonl; tensorboard and wandb are extras of this package's, and W&B's own variables
    (WANDB_MODE=offline, WANDB_PROJECT) hold"""
    run_name: str | None = None
    """what the run is called there; by default its folder's name"""
