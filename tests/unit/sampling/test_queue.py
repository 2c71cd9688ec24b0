"""The queue of rollouts on an engine that draws when the test lets it: who runs beside whom is told by events.

Blind to several ranks, for which ``tests/distributed/test_serving.py`` is there, and to what servers really draw.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from prism_megatron.data.loader import Example
from prism_megatron.errors import DataError, RolloutError
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.sampling.queue import RolloutQueue, Staleness, staleness
from prism_megatron.types import Prompt, Response, Rollout, RolloutGroup, Segments, VersionSpan

SEGMENTS = Segments(None, None, "not judged")
PATIENCE_SECONDS = 60.0
N, SEED = 2, 3


class GatedEngine:
    """Draws a step's answers once it is allowed to: the first token at once, two more at the end."""

    def __init__(self, *, gated: bool = False) -> None:
        self.policy_version = 0
        self.started: dict[int, threading.Event] = defaultdict(threading.Event)
        self.allowed: dict[int, threading.Event] = defaultdict(threading.Event)
        self.asked: list[tuple[int, tuple[str, ...]]] = []
        self.broken_step: int | None = None
        self.closed = False
        self.lags = False
        """whether all answers are those of version 0"""
        self.together: threading.Barrier | None = None
        """what further draws wait at, in place of being allowed"""
        self.seeds: set[int] = set()
        self._gated = gated

    def generate(self, request: SampleRequest) -> Any:
        first, prompts, step = 0 if self.lags else self.policy_version, request.prompts, request.step
        self.seeds.add(request.seed)
        self.asked.append((step, tuple(prompt.id for prompt in prompts)))
        together = self.together
        self.started[step].set()
        if together is not None:
            together.wait(PATIENCE_SECONDS / 2)
        elif self._gated:
            assert self.allowed[step].wait(PATIENCE_SECONDS)
        if self.closed:
            raise RolloutError("closed")
        if step == self.broken_step:
            raise DataError(f"prompt {prompts[0].id!r} is too long")
        return [(rollout(first, self.policy_version),) * len(numbers) for numbers in request.wanted]

    def close(self) -> None:
        self.closed = True
        for event in self.allowed.values():
            event.set()


def rollout(first: int, then: int) -> Rollout:
    versions = (VersionSpan(first, 0, 1), VersionSpan(then, 1, 3)) if first != then else (VersionSpan(first, 0, 3),)
    return Rollout((5, 6, 7), (-0.1, -0.2, -0.3), "stop", versions, SEGMENTS)


def examples(step: int) -> list[Example]:
    return [Example(Prompt(f"{step}-{i}", (5,), (), ""), Response((7,), SEGMENTS)) for i in range(2)]


@pytest.fixture(autouse=True, scope="module")
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


@pytest.fixture
def queue_on() -> Iterator[Callable[..., RolloutQueue]]:
    queues: list[RolloutQueue] = []

    def make(engine: Any, *, ahead: int, steps: int) -> RolloutQueue:
        world: Any = type("World", (), {"rank": 0})
        queues.append(
            RolloutQueue(engine, examples, Sampling(), n=N, seed=SEED, world=world, steps=range(steps), ahead=ahead)
        )
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()
    assert not [thread for thread in threading.enumerate() if "rollouts ahead" in thread.name], "threads outlive close"


def test_the_next_step_is_drawn_while_this_one_trains(queue_on: Callable[..., RolloutQueue]) -> None:
    """Step 1 begins before step 0 is over, and ends after the update in between: both versions are in its answers."""
    engine = GatedEngine(gated=True)
    queue = queue_on(engine, ahead=1, steps=2)
    engine.allowed[0].set()
    first = queue.take(0)
    assert first.version == 0 and first.staleness == Staleness(0.0, 0, 0.0)
    assert engine.started[1].wait(PATIENCE_SECONDS), "nothing is drawn while step 0 trains"
    engine.policy_version = 1
    engine.allowed[1].set()
    second = queue.take(1)
    assert [len(group.rollouts) for group in second.groups] == [N, N]
    assert second.version == 1
    assert second.groups[0].rollouts[0].versions == (VersionSpan(0, 0, 1), VersionSpan(1, 1, 3))
    assert second.staleness == Staleness(mean_updates=1.0, max_updates=1, off_policy_share=1.0 - 2 / 3)


def test_a_synchronous_step_is_drawn_when_it_is_taken(queue_on: Callable[..., RolloutQueue]) -> None:
    """By the calling thread, from the policy of that moment, and no earlier."""
    engine = GatedEngine()
    queue = queue_on(engine, ahead=0, steps=3)
    for step in range(3):
        assert queue.take(step).staleness == Staleness(0.0, 0, 0.0)
        assert [asked for asked, _ in engine.asked] == list(range(step + 1))
        engine.policy_version = step + 1


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_rollouts_are_as_many_updates_old_as_allowed_and_no_more(
    ahead: int, queue_on: Callable[..., RolloutQueue]
) -> None:
    """The same prompts for each step as in a synchronous run, and none for steps past the last."""
    num_steps = 5
    engine = GatedEngine()
    queue = queue_on(engine, ahead=ahead, steps=num_steps)
    for step in range(num_steps):
        taken = queue.take(step)
        last_begun = min(step + ahead, num_steps - 1)
        assert engine.started[last_begun].wait(PATIENCE_SECONDS)
        assert taken.staleness.max_updates == min(step, ahead)
        assert [example.prompt.id for example in taken.examples] == [f"{step}-0", f"{step}-1"]
        assert [group.prompt.id for group in taken.groups] == [f"{step}-0", f"{step}-1"]
        engine.policy_version = step + 1
    assert sorted(engine.asked) == [(step, (f"{step}-0", f"{step}-1")) for step in range(num_steps)]


def test_an_answer_older_than_was_promised_is_not_trained_on(queue_on: Callable[..., RolloutQueue]) -> None:
    """With one step ahead answers one update old pass; an engine that still gives those of two ago is found out."""
    engine = GatedEngine()
    engine.lags = True
    queue = queue_on(engine, ahead=1, steps=3)
    for step in range(2):
        assert queue.take(step).staleness.max_updates == step
        engine.policy_version = step + 1
    with pytest.raises(AssertionError, match="version 0 is too old to train"):
        queue.take(2)


def test_steps_without_an_update_make_no_answer_older(queue_on: Callable[..., RolloutQueue]) -> None:
    """A policy that moves in every third step only: its answers of that long are on-policy, the next ones not."""
    engine = GatedEngine()
    queue = queue_on(engine, ahead=1, steps=5)
    engine.policy_version = 4
    fresh = [queue.take(step).staleness.max_updates for step in range(3)]
    assert engine.started[3].wait(PATIENCE_SECONDS)
    engine.policy_version = 7
    assert [*fresh, queue.take(3).staleness.max_updates] == [0, 0, 0, 1]


def test_draws_are_keyed_by_the_run_s_seed_and_by_the_step(queue_on: Callable[..., RolloutQueue]) -> None:
    engine = GatedEngine()
    queue = queue_on(engine, ahead=1, steps=3)
    for step in range(3):
        queue.take(step)
    assert engine.seeds == {SEED}
    assert sorted(step for step, _ in engine.asked) == [0, 1, 2]


def test_what_is_begun_again_waits_for_no_answer_that_nobody_wants(queue_on: Callable[..., RolloutQueue]) -> None:
    """Steps 1 to 3 of the new policy are drawn side by side while steps 1 and 2 of the old one still are."""
    engine = GatedEngine(gated=True)
    queue = queue_on(engine, ahead=2, steps=4)
    engine.allowed[0].set()
    queue.take(0)
    for step in (1, 2):
        assert engine.started[step].wait(PATIENCE_SECONDS)
    queue.begin_again()
    engine.together = threading.Barrier(3)
    assert len(queue.take(1).groups) == 2


def test_staleness_counts_updates_and_not_version_numbers() -> None:
    """Steps without an update leave gaps in the numbers; what is older than all known versions is never trained on."""
    example = examples(0)[0]
    group = RolloutGroup(example.prompt, example.reference, (rollout(2, 2), rollout(2, 9), rollout(9, 9)))
    found = staleness([group], [2, 9])
    assert found == Staleness(mean_updates=2 / 3, max_updates=1, off_policy_share=1.0 - 5 / 9)
    with pytest.raises(AssertionError, match="version 2 is too old"):
        staleness([group], [8, 9])


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_fails_in_the_background_is_raised_by_the_step_that_needs_it(
    ahead: int, queue_on: Callable[..., RolloutQueue]
) -> None:
    engine = GatedEngine()
    engine.broken_step = 1
    queue = queue_on(engine, ahead=ahead, steps=4)
    queue.take(0)
    with pytest.raises(DataError, match=r"^prompt '1-0' is too long$"):
        queue.take(1)


def test_what_a_replaced_policy_drew_ahead_is_drawn_again(queue_on: Callable[..., RolloutQueue]) -> None:
    """Each step once more, in order, by the new policy; what the old one had is trained on by no step."""
    engine = GatedEngine()
    queue = queue_on(engine, ahead=2, steps=4)
    queue.take(0)
    for step in (1, 2):
        assert engine.started[step].wait(PATIENCE_SECONDS)
    engine.policy_version = 1
    queue.begin_again()
    for step in (1, 2, 3):
        taken = queue.take(step)
        assert {r.policy_version for group in taken.groups for r in group.rollouts} == {1}
        assert [example.prompt.id for example in taken.examples] == [f"{step}-0", f"{step}-1"]
    assert sorted(step for step, _ in engine.asked) == [0, 1, 1, 2, 2, 3]


def test_closing_ends_what_nobody_will_take(queue_on: Callable[..., RolloutQueue]) -> None:
    """A run that fails between two steps: the engine is closed, which ends its drawing, and the threads are joined."""
    engine = GatedEngine(gated=True)
    queue = queue_on(engine, ahead=2, steps=9)
    engine.allowed[0].set()
    queue.take(0)
    for step in (1, 2):
        assert engine.started[step].wait(PATIENCE_SECONDS)
    queue.close()
    assert engine.closed and len(engine.asked) == 3


def test_a_finished_run_leaves_the_engine_open(queue_on: Callable[..., RolloutQueue]) -> None:
    engine = GatedEngine()
    queue = queue_on(engine, ahead=3, steps=2)
    for step in range(2):
        queue.take(step)
    queue.close()
    assert not engine.closed
