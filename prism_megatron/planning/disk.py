"""What a run's checkpoints take on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.forecast.before_start import whole_policy
from prism_megatron.forecast.plays import Case
from prism_megatron.planning.build import Run
from prism_megatron.planning.held import held_by_part

_STATE = 12
"""Bytes of optimizer state for a weight that trains in bf16: an fp32 master and two moments."""


@dataclass(frozen=True)
class Disk:
    """Bytes."""

    checkpoint: Mapping[str, int]
    """of one, by role: weights and optimizer state"""
    kept: int
    """checkpoints at the end of the run"""
    export: int
    """the policy as a Hugging Face folder"""

    @property
    def total(self) -> int:
        return self.kept * sum(self.checkpoint.values()) + self.export


def disk_of(run: Run) -> Disk:
    """All checkpoints of a run that keeps what its flags say."""
    planned, config = run.planned(), run.config.checkpoint
    made = -(-run.steps // config.save_every)
    # The good one that a run may go back to is kept beside the newest.
    kept = made if config.keep_last is None else min(made, config.keep_last + 1)
    sizes = {role: _checkpoint(case) for role, case in planned.roles.items()}
    return Disk(sizes, kept, whole_policy(planned.policy))


def _checkpoint(case: Case) -> int:
    """Of the whole model, on no layout."""
    alone = Case(case.play, case.shape, ParallelConfig(), towers=case.towers, dtype=case.dtype, freeze=case.freeze)
    held = held_by_part(alone)
    weights = sum(one.parameters for one in held.values())
    trained = sum(one.gradients for one in held.values()) // 4
    return weights + (_STATE if case.dtype.itemsize == 2 else 8) * trained
