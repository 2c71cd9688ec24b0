"""Waiting for a state instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 60.0


def wait_for(condition: Callable[[], bool], *, seconds: float = PATIENCE_SECONDS, poll_seconds: float = 0.002) -> None:
    """Return once ``condition()`` holds; a test that waits for what never comes fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"what was waited for did not come in {seconds:.0f} s"
        time.sleep(poll_seconds)
