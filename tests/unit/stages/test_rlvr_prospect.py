"""Which groups a step learns from, and which prompts the next one asks (blind spot: real rollouts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prism_megatron.rewards.presets import Reward
from prism_megatron.sampling.queue import SampledStep, Staleness
from prism_megatron.stages.rlvr.prospect import Prospector
from tests.unit.stages.tiny_rewards import group, rewarded

MIXED, RIGHT, WRONG = (True, False), (True, True), (False, False)
Batch = Sequence[tuple[bool, ...]]


class Batches:
    """A queue whose batches are known; it remembers which were taken."""

    def __init__(self, *batches: Batch) -> None:
        self.taken: list[int] = []
        self._batches = batches

    def take(self, number: int) -> SampledStep:
        self.taken.append(number)
        groups = [group(rights, name=f"{number}-{i}") for i, rights in enumerate(self._batches[number])]
        return SampledStep([one.example for one in groups], [one.group for one in groups], 7, Staleness(0.0, 0, 0.0),
                           [one.rewards for one in groups])  # fmt: skip


def prospector(queue: Any, *, wanted: int, most: int = 1, selective: bool = False) -> Prospector:
    return Prospector(queue, wanted, most, selective)


def names(found: Any) -> list[str]:
    return [one.example.prompt.id for one in found.groups]


def test_without_selection_a_step_is_a_batch() -> None:
    queue = Batches([MIXED, RIGHT], [WRONG, MIXED])
    one = prospector(queue, wanted=2)
    first, second = one.find(), one.find()
    assert (names(first), names(second)) == (["0-0", "0-1"], ["1-0", "1-1"])
    assert queue.taken == [0, 1] and first.version == 7 and first.surplus == 0


def test_batches_are_asked_until_there_are_enough_groups_of_both() -> None:
    """Claim: 2 of 3 in two batches, the third has one too many; the next step begins with the batch after it."""
    queue = Batches([MIXED, RIGHT], [WRONG, MIXED], [MIXED, MIXED], [MIXED, MIXED, MIXED])
    one = prospector(queue, wanted=3, most=5, selective=True)
    found = one.find()
    assert names(found) == ["0-0", "1-1", "2-0"]
    assert (found.surplus, len(found.batches), len(found.asked)) == (1, 3, 6)
    assert found.counts() == {"mixed": 4, "all_right": 1, "none_right": 1}
    assert one.cursor == 3 and names(one.find()) == ["3-0", "3-1", "3-2"]


def test_the_search_ends_within_its_bound() -> None:
    """Claim: with what was found, or with nothing, and no batch is asked twice."""
    queue = Batches([RIGHT, WRONG], [RIGHT, MIXED], [RIGHT, RIGHT], [WRONG, WRONG])
    one = prospector(queue, wanted=2, most=2, selective=True)
    assert names(one.find()) == ["1-1"]
    assert names(one.find()) == []
    assert queue.taken == [0, 1, 2, 3]


def test_a_run_that_goes_on_asks_what_comes_next() -> None:
    queue = Batches([MIXED], [MIXED], [MIXED])
    one = prospector(queue, wanted=1)
    one.cursor = 2
    one.find()
    assert queue.taken == [2]


def test_form_alone_is_no_contrast() -> None:
    """Claim: two wrong answers, one of them in the asked form, are rewarded otherwise and teach no answer."""
    one = group(WRONG)
    odd = replace(one, rewards=[rewarded(False), rewarded(False, valid=False)])
    assert odd.rewards[0].reward.total != odd.rewards[1].reward.total
    assert not odd.informative and group(MIXED).informative


def test_numbers_of_a_users_function_are_contrast() -> None:
    """Claim: 0.5 and 0.75 differ, and both count as right."""
    rewards = [replace(rewarded(True), reward=Reward({"reward": value, "format": 1.0}, {"reward": 0.8, "format": 0.2}))
               for value in (0.5, 0.75)]  # fmt: skip
    one = replace(group(RIGHT), rewards=rewards)
    assert one.informative and one.right == 2
