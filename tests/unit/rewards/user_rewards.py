"""Functions that ``test_rewarder.py`` names as ``--reward``: good ones, and each way to be bad."""

from __future__ import annotations

import time
from typing import Any

from prism_megatron.rewards.user import RewardInput

not_a_function = 3


def equal(sample: RewardInput) -> float:
    print("this is no reply")
    return float(sample.answer == sample.gold)


def yes(sample: RewardInput) -> bool:
    return sample.valid and sample.question == "How many?"


def raises(sample: RewardInput) -> float:
    raise KeyError(sample.id)


def text(sample: RewardInput) -> Any:
    return "1.0"


def nan(sample: RewardInput) -> float:
    return float("nan")


def huge(sample: RewardInput) -> Any:
    return 10**1000


def sleeps(sample: RewardInput) -> float:
    if sample.answer == "hang":
        time.sleep(600)  # until it is ended, for its limit has passed
    return 1.0


def spins(sample: RewardInput) -> float:
    while sample.answer == "hang":
        pass
    return 1.0


def exits(sample: RewardInput) -> float:
    if sample.answer == "hang":
        raise SystemExit(0)
    return 1.0
