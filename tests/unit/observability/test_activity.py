"""What a run is at, in one line; and a thread that says it in silence, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prism_megatron.observability.activity import Activity, Heartbeat
from tests.waiting import wait_for


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_has_step_phase_count_time_and_time_left() -> None:
    """45 of 64 answers in 12 s: the other 19 take about 5 s."""
    clock = Clock()
    activity = Activity(clock)
    activity.step = 12
    with activity.phase("rollout"), activity.task("answers", total=64) as advance:
        clock.now += 12
        assert activity.text() == "step 12: rollout, 0 of 64 answers, 12 s"
        advance(45)
        assert activity.text() == "step 12: rollout, 45 of 64 answers, 12 s, about 5 s left"
        advance(19)
        assert activity.text() == "step 12: rollout, 64 of 64 answers, 12 s"


def test_what_is_over_is_not_told_and_between_phases_the_silence_is() -> None:
    clock = Clock()
    activity = Activity(clock)
    with activity.phase("weight_sync"):
        assert activity.text() == "weight sync, 0 s"
    clock.now += 3
    assert activity.text() == "going on, 3 s"


def test_a_count_inside_another_stands_behind_it_and_the_time_left_is_the_outer_ones() -> None:
    clock = Clock()
    activity = Activity(clock)
    with activity.phase("format SFT"), activity.task("steps", total=4) as outer:
        clock.now += 10
        outer(1)
        with activity.task("micro-batches", total=2) as inner:
            inner(1)
            assert activity.text() == (
                "format SFT, 1 of 4 steps, 1 of 2 micro-batches, 10 s, about 30 s left"
            )  # fmt: skip


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_what_another_thread_counts_is_told_while_this_one_counts_nothing() -> None:
    """As with rollouts ahead: those of later steps must not stand in the phase that trains."""
    activity = Activity(Clock())
    begun, over = threading.Event(), threading.Event()

    def sample() -> None:
        with activity.task("answers", total=8) as advance:
            advance(2)
            begun.set()
            over.wait(60)

    thread = threading.Thread(target=sample)
    thread.start()
    begun.wait(60)
    try:
        assert "2 of 8 answers" in activity.text()
        with activity.task("micro-batches", total=3) as advance:
            in_a_thread(lambda: advance(1))
            assert activity.text() == "going on, 1 of 3 micro-batches, 0 s"
    finally:
        over.set()
        thread.join()


def test_counts_of_several_threads_add_up() -> None:
    activity = Activity(Clock())
    with activity.task("answers", total=4000) as advance:
        threads = [threading.Thread(target=lambda: [advance(1) for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "4000 of 4000" in activity.text()


def beats() -> int:
    return sum(thread.name == "heartbeat" for thread in threading.enumerate())


def test_a_line_comes_in_silence_alone_and_no_thread_is_left() -> None:
    before = beats()
    silent, looks, said = [0.0], [0], list[str]()

    def seconds_silent() -> float:
        looks[0] += 1
        return silent[0]

    heartbeat = Heartbeat(Activity(), say=said.append, seconds_silent=seconds_silent, poll_seconds=0.001)
    assert beats() == before + 1
    silent[0] = 9.9
    wait_for(lambda: looks[0] > 20)
    assert said == []
    silent[0] = 10.0
    wait_for(lambda: bool(said))
    heartbeat.close()
    heartbeat.close()
    assert beats() == before
    assert said[0].startswith("going on, ")


def test_a_line_that_cannot_be_said_disturbs_nobody() -> None:
    before = beats()

    def broken(_text: str) -> None:
        raise OSError("no terminal")

    heartbeat = Heartbeat(Activity(), say=broken, seconds_silent=lambda: 99.0, poll_seconds=0.001)
    wait_for(lambda: beats() == before)
    heartbeat.close()
