"""What ranks do in ``test_stopping.py``: a run in which a signal comes in a phase of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.run.session import Session
from prism_megatron.stages.align.build import align_on

STEPS = 3


def config(parallel: ParallelConfig, **where: Path) -> AlignConfig:
    return replace(
        MINI_ALIGN,
        parallel=parallel,
        model=replace(MINI_ALIGN.model, dtype="fp32"),
        rollout=replace(MINI_ALIGN.rollout, prompts_per_step=2, rollouts_per_prompt=2),
        checkpoint=CheckpointConfig(save_every=1, **where),  # type: ignore[arg-type]  # paths alone are given
        tokens_per_microbatch=512,
        steps=STEPS,
    )


def play(world: World, asked: AlignConfig) -> str:
    """The run; returns the class and the words of what ended it, if anything did."""
    try:
        align_on(world, asked)
    except PrismError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def play_and_stop(world: World, asked: AlignConfig, phase: str, number: int) -> str:
    """The same, with a signal to the last rank alone as it enters ``phase`` for the second time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which ranks of tests ignore
    entered = 0

    def wrap(method: Any) -> Any:
        @contextmanager
        def phased(self: Any, name: str, *rest: Any) -> Iterator[None]:
            nonlocal entered
            with method(self, name, *rest):
                entered += name == phase
                if name == phase and entered == 2 and world.rank == world.world_size - 1:
                    signal.raise_signal(number)
                yield

        return phased

    with (
        mock.patch.object(PhaseTimers, "phase", wrap(PhaseTimers.phase)),
        mock.patch.object(Session, "phase", wrap(Session.phase)),
    ):
        return play(world, asked)
