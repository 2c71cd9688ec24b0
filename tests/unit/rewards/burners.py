"""Functions that ``test_workers.py`` has called in workers: each uses up, or breaks, something."""

from __future__ import annotations

import os
import sys
import time

from prism_megatron.rewards.user import RewardInput


def burn(sample: RewardInput) -> float:
    """So many seconds of CPU time."""
    end = time.process_time() + float(sample.answer)
    while time.process_time() < end:
        pass
    return 1.0


def grow(sample: RewardInput) -> float:
    """So many GiB."""
    return float(len(bytearray(int(sample.answer) * 2**30)) >= 0)


def crash(sample: RewardInput) -> float:
    """By the signal of that number; 0 is none."""
    os.kill(os.getpid(), int(sample.answer))
    return 1.0


def holds_torch(sample: RewardInput) -> float:
    return float("torch" in sys.modules)
