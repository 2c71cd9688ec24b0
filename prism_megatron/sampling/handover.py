"""The policy's new weights go to whoever samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prism_megatron.engine.engine import DEFAULT_BUCKET_BYTES, MegatronEngine
from prism_megatron.rollout.base import RolloutEngine


def trust(_version: int) -> None:
    """The embedded engine's weights are in this process; nothing is asked."""


@dataclass(frozen=True, eq=False)
class Handover:
    """From a policy to a rollout engine, on all ranks together."""

    policy: MegatronEngine
    rollout: RolloutEngine
    gather_bytes: int = DEFAULT_BUCKET_BYTES
    """most of the weights that are gathered at a time"""
    check_served: Callable[[int], None] = trust
    """asked on all ranks with each new version; raises if the rollout engine does not have it"""

    def __call__(self, version: int, *, changed_only: bool = True) -> None:
        """Hand ``version`` over, what training changes of it or all of it, to an engine that can then be asked.

        Raises WeightSyncError on every rank.
        """
        weights = self.policy.export_hf(self.gather_bytes, layout=self.rollout.expert_layout, changed_only=changed_only)
        self.rollout.update_weights(weights, version)
        self.rollout.wake()
        self.check_served(version)
