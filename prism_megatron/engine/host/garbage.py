"""When Python looks for garbage: by itself, or at steps that all ranks share.

A collection on one rank makes all others wait at the next collective, and with thousands of ranks there is always one
that collects. Megatron's loop has the same (``--manual-gc``).
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """Python's, until :meth:`begin` takes it over, and again after :meth:`close`."""

    def __init__(self) -> None:
        self._every = self._steps = 0

    def begin(self, every: int) -> None:
        """From now on collect before every so many steps and never between; 0 leaves it to Python."""
        self._every = every
        if every:
            # What is there by now (libraries, the model) stays: looking through it again would take most of the time.
            gc.collect()
            gc.freeze()
            gc.disable()

    def before_step(self) -> None:
        """Collect if so many steps are over since the last time."""
        if self._every and self._steps == self._every:
            gc.collect()
            self._steps = 0
        self._steps += 1

    def close(self) -> None:
        """May be called again."""
        if self._every:
            self._every = 0
            gc.unfreeze()
            gc.enable()
