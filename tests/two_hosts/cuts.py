"""What may befall one of two hosts in mid-run, and how soon the run has to have ended on whatever is left of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

How = Literal["crash", "power", "link", "stall"]
PHASES = ("rollout", "discriminator", "policy", "weight_sync", "checkpoint")
NOTICED_SECONDS = 60.0
"""What a host may take beyond that: whatever a rank still does alone before it has to wait, two seconds to tell who is
gone, a summary, and the thirty that torchrun gives to ranks which still wait for another one."""


@dataclass(frozen=True)
class Cut:
    """One thing that befalls a run in mid-step."""

    name: str
    how: How
    """crash: the processes of the host are killed, and its kernel tells the other; power: the link is gone first, so
    that nobody is told; link: it goes, and both hosts live; stall: it goes, and comes back"""
    place: str
    """where the ranks of the host stand just then, see ``rank.py``"""
    host: int
    """0 is the one with the first rank and the store of the rendezvous"""

    @property
    def survivors(self) -> tuple[int, ...]:
        """Hosts whose processes are left to end by themselves."""
        return (0, 1) if self.how in ("link", "stall") else (1 - self.host,)

    def bound_seconds(self, timeout_minutes: int) -> float:
        """Within which the survivors must have ended, for ``--distributed-timeout-minutes``.

        A killed process closes its connections; of a silent one only the timeout tells.
        """
        return NOTICED_SECONDS + (0.0 if self.how == "crash" else 60.0 * timeout_minutes)


def all_cuts() -> Mapping[str, Cut]:
    """By name, in the order in which they are played."""
    cuts = [Cut(f"crash-{phase}", "crash", phase, 1) for phase in PHASES]
    cuts += [Cut(f"power-{phase}", "power", phase, 1) for phase in PHASES]
    cuts += [
        Cut("crash-master", "crash", "policy", 0),
        Cut("crash-master-commit", "crash", "commit", 0),
        Cut("power-master", "power", "policy", 0),
        Cut("link", "link", "policy", 1),
        Cut("stall", "stall", "policy", 1),
    ]
    return {cut.name: cut for cut in cuts}
