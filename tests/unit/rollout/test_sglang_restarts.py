"""The budget of restarts, by a clock that a test sets."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from prism_megatron.rollout.sglang.restarts import PER_HOUR, Restarts


def allowed(times: Sequence[float], per_hour: int = PER_HOUR) -> list[bool]:
    """Whether a restart may begin at each of these times, in seconds."""
    ticks = iter(times)
    restarts = Restarts(per_hour, clock=lambda: next(ticks))
    return [restarts.begin() for _ in times]


def test_deaths_that_are_far_between_never_exhaust_it() -> None:
    """Claim: 20 in two hours are all started again; of 20 in a minute the first twelve are."""
    assert all(allowed([360.0 * death for death in range(20)]))
    assert allowed([3.0 * death for death in range(20)]) == [True] * 12 + [False] * 8


def test_an_hour_later_there_is_room_again() -> None:
    assert allowed([0.0, 1.0, 2.0, 3599.9, 3600.0, 3600.5, 3601.0], per_hour=2) == [
        True, True, False, False, True, False, True,
    ]  # fmt: skip


def test_none_may_be_allowed() -> None:
    assert allowed([0.0, 9000.0], per_hour=0) == [False, False]


@given(gaps=st.lists(st.floats(0.0, 4000.0), max_size=60), per_hour=st.integers(0, 5))
def test_no_hour_has_more_than_it_may(gaps: list[float], per_hour: int) -> None:
    """Claim: in any window of an hour, and a death is refused only if the hour before it is full."""
    times = [sum(gaps[: place + 1]) for place in range(len(gaps))]
    begun: list[float] = []
    for now, may in zip(times, allowed(times, per_hour), strict=True):
        within = sum(now - then < 3600.0 for then in begun)
        assert may == (within < per_hour)
        if may:
            begun.append(now)
