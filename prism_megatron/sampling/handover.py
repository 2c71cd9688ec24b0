"""The policy's new weights go to whoever samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prism_megatron.engine.engine import DEFAULT_BUCKET_BYTES, MegatronEngine
from prism_megatron.rollout.base import RolloutEngine
from prism_megatron.rollout.sglang.weights import LostVersionError
from prism_megatron.sampling.shared_rollout import SharedRollout


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
        self.give(version, changed_only=changed_only)
        self.rollout.wake()
        self.check_served(version)

    def give(self, version: int, *, changed_only: bool) -> None:
        """Hand ``version`` over, to an engine that may sleep on. Every rank gathers all of it."""
        weights = self.policy.export_hf(self.gather_bytes, layout=self.rollout.expert_layout, changed_only=changed_only)
        self.rollout.update_weights(weights, version)

    def wake(self) -> None:
        """Make sure that samples can be drawn again, with the version that was handed over last."""
        self.rollout.wake()


@dataclass(frozen=True, eq=False)
class SharedHandover(Handover):
    """From a policy to servers: each rank that holds a part of the weights first gathers and sends that part alone."""

    rollout: SharedRollout

    def give(self, version: int, *, changed_only: bool) -> None:
        """Hand ``version`` over; all of it where servers lack what it does not change.

        Servers that failed in the middle hold no whole version and wait for one: once they are given all of it again.
        """
        try:
            self._share(version, changed_only=changed_only and self.rollout.holds_rest())
        except LostVersionError:
            self._share(version, changed_only=False)

    def wake(self) -> None:
        """As of ``Handover``; servers that let go of their weights are handed them again."""
        held = self.rollout.policy_version
        if held is not None and self.rollout.lacks_weights():
            self.give(held, changed_only=False)
        self.rollout.wake()

    def _share(self, version: int, *, changed_only: bool) -> None:
        share = self.policy.export_share(
            self.gather_bytes, layout=self.rollout.expert_layout, changed_only=changed_only
        )
        self.rollout.update_weights(share, version)
