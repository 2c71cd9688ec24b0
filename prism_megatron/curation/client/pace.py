"""How long is waited before something is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from prism_megatron.curation.client.limits import MINUTE_SECONDS


@dataclass(frozen=True)
class Pace:
    """Times in seconds."""

    first_pause: float = 1.0
    longest_pause: float = 60.0
    longest_wait: float = 3600.0
    """that an endpoint may ask for; one that asks for more ends the curation"""
    minute: float = MINUTE_SECONDS
    """of limits a minute"""
    poll: float = 0.2
    """between looks at a call that another process asks"""

    def pause(self, failures: int, *, drawn_by: str) -> float:
        """After so many failures in a row: twice as long each time, less up to a half, which ``drawn_by`` draws, so
        that not all come back at once."""
        whole: float = min(self.first_pause * 2.0 ** min(failures - 1, 60), self.longest_pause)
        return whole * random.Random(drawn_by).uniform(0.5, 1.0)
