"""When Python looks for garbage: by itself, or at steps that all ranks share.

A collection on one rank makes all others wait at the next collective, and with thousands of ranks there is always one
that collects. Megatron's loop has the same (``--manual-gc``).
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """Collects every ``every`` steps and never between; 0 changes nothing. :meth:`close` gives it back to Python."""

    def __init__(self, every: int) -> None:
        self._every, self._steps = every, 0
        if every:
            # What is there by now (libraries, the model) stays: looking through it again would take most of the time.
            gc.collect()
            gc.freeze()
            gc.disable()

    def after_step(self) -> None:
        """Count a step, and collect if it is time."""
        self._steps += 1
        if self._every and self._steps % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """May be called again."""
        if self._every:
            self._every = 0
            gc.unfreeze()
            gc.enable()
