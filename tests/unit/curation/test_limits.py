"""What may begin in a minute."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.curation.client.limits import MINUTE_SECONDS, ON_THE_WAY_SECONDS, Entry, Limits, Window


def _played(limit: int, seed: int, *, longest: float) -> list[tuple[float, float]]:
    """When requests began and ended that were as many as a window let through, over some minutes of a false clock."""
    drawn = random.Random(seed)
    window, now = Window(limit), 0.0
    begun: list[tuple[float, float]] = []
    under_way: list[tuple[float, Entry]] = []
    while now < 400.0:
        for end, entry in [one for one in under_way if one[0] <= now]:
            window.end(entry, 1, now=now)
            under_way.remove((end, entry))
        wait = window.wait(1, now=now)
        if wait == 0.0:
            end = now + drawn.uniform(0.0, longest)
            begun.append((now, end))
            under_way.append((end, window.begin(1, now=now)))
            now += drawn.choice((0.0, 0.001, drawn.expovariate(1.0)))
        else:
            now += drawn.choice((wait, wait / 2, wait + drawn.random()))
    return begun


@settings(max_examples=60, deadline=None)
@given(limit=st.integers(1, 40), seed=st.integers(0, 2**32), longest=st.sampled_from([0.01, 1.0, 100.0]))
def test_no_sixty_seconds_see_more_than_the_limit(limit: int, seed: int, longest: float) -> None:
    """Claim: in any 60 s, wherever they begin, no more requests begin than the limit, nor arrive, if each arrives at
    most 2 s after it began; and where much is asked for, the limit is made use of."""
    begun = _played(limit, seed, longest=longest)
    drawn = random.Random(seed + 1)
    arrivals = sorted(drawn.uniform(begin, min(end, begin + ON_THE_WAY_SECONDS)) for begin, end in begun)
    for times in ([begin for begin, _ in begun], arrivals):
        for index in range(len(times) - limit):
            assert times[index + limit] - times[index] >= MINUTE_SECONDS - 1e-9
    assert len(begun) >= min(limit, 40) * 3


def test_tokens_are_corrected_once_they_are_known() -> None:
    """Claim: an estimate counts until the end of the call, and what the call took from then on; a minute later it
    counts no more, also where the end comes after that."""
    window = Window(100)
    first = window.begin(80, now=0.0)
    assert window.wait(30, now=1.0) == pytest.approx(61.0)
    window.end(first, 20, now=2.0)
    assert window.wait(80, now=3.0) == 0.0 and window.wait(81, now=3.0) == pytest.approx(59.0)
    long = window.begin(80, now=3.0)
    assert window.wait(100, now=100.0) == 0.0
    window.end(long, 90, now=101.0)
    window.begin(1, now=101.0)
    assert window.wait(99, now=101.0) == 0.0, "it has left already"


def test_what_does_not_begin_does_not_count() -> None:
    limits = Limits(requests=1, tokens=math.inf)
    begun = limits.begin(5, now=0.0)
    assert limits.wait(5, now=0.0) > 0
    limits.withdraw(begun)
    assert limits.wait(5, now=0.0) == 0.0


def test_both_limits_hold() -> None:
    """Claim: requests and tokens are counted apart, and the later of both decides."""
    limits = Limits(requests=2, tokens=100)
    limits.end(limits.begin(90, now=0.0), 90, now=0.0)
    assert limits.wait(5, now=10.0) == 0.0
    assert limits.wait(20, now=10.0) == pytest.approx(50.0)
    limits.end(limits.begin(5, now=10.0), None, now=10.0)
    assert limits.wait(1, now=10.0) == pytest.approx(50.0)


def test_more_than_a_limit_waits_until_nothing_else_counts() -> None:
    """Claim: a call that is estimated at more than a minute's tokens begins all the same, by itself."""
    window = Window(100)
    assert window.wait(500, now=0.0) == 0.0
    window.end(window.begin(10, now=0.0), 10, now=0.0)
    assert window.wait(500, now=0.0) == pytest.approx(60.0)
