"""Which of several servers is asked next. No server is there, and no request is made."""

from __future__ import annotations

import time

from prism_megatron.rollout.sglang.http import Patience, ServerClient
from prism_megatron.rollout.sglang.pool import Pool
from tests.waiting import wait_for

HOURS = 10_000.0


def clients(count: int, patience: Patience) -> list[ServerClient]:
    return [ServerClient(f"http://127.0.0.1:{port}", api_key=None, patience=patience) for port in range(1, count + 1)]


def far() -> float:
    return time.monotonic() + HOURS


def test_the_server_with_the_fewest_samples_to_draw_is_asked() -> None:
    """A request of five samples is five times the work of one; what is done counts no more."""
    one, two = clients(2, Patience())
    pool = Pool([one, two])
    five = pool.least_loaded(5, far())
    assert five.client is one and pool.is_busy()
    others = [pool.least_loaded(samples, far()) for samples in (2, 2, 2)]
    assert [place.client for place in others] == [two, two, two]
    assert pool.least_loaded(1, far()).client is one
    with five:
        pass
    assert pool.least_loaded(1, far()).client is one


def test_a_server_that_failed_is_left_alone_while_another_is_there() -> None:
    one, two = clients(2, Patience(first_pause=HOURS, longest_pause=HOURS))
    pool = Pool([one, two])
    with pool.least_loaded(1, far()) as place:
        place.failed()
    assert not pool.is_busy()
    assert [pool.least_loaded(1, far()).client for _ in range(3)] == [two] * 3


def test_a_near_server_is_asked_before_others_and_one_that_is_out_last() -> None:
    """However much the near one has to do; where it failed the next nearest takes over."""
    one, two, three = clients(3, Patience(first_pause=HOURS, longest_pause=HOURS))
    out = {one.url}
    pool = Pool([one, two, three], near=[three.url], is_out=lambda url: url in out)
    places = [pool.least_loaded(5, far()) for _ in range(3)]
    assert [place.client for place in places] == [three] * 3
    places[0].failed()
    assert pool.least_loaded(1, far()).client is two
    out.clear()
    assert pool.least_loaded(1, far()).client is one


def test_one_request_finds_out_whether_a_server_is_there_again() -> None:
    """Claim: where attempts take long, one at a time is lost on a server that is gone."""
    one, two = clients(2, Patience(first_pause=0.002, longest_pause=HOURS))
    pool = Pool([one, two], near=[one.url])
    pool.least_loaded(1, far()).failed()
    entry = next(entry for entry in pool._entries if entry.client is one)
    entry.pause = HOURS
    wait_for(lambda: entry.not_before <= time.monotonic())
    trial = pool.least_loaded(1, far())
    assert trial.client is one
    assert pool.least_loaded(1, far()).client is two, "all others"
    trial.worked()
    assert pool.least_loaded(1, far()).client is one


def test_where_all_failed_the_deadline_is_not_waited_beyond() -> None:
    (one,) = clients(1, Patience(first_pause=HOURS, longest_pause=HOURS))
    pool = Pool([one])
    with pool.least_loaded(1, far()) as place:
        place.failed()
    assert pool.least_loaded(1, time.monotonic() + 0.01).client is one


def test_a_success_makes_the_next_failure_the_first() -> None:
    """After thirty failures in a row the pause is of hours; after one that follows a success it is the first again."""
    (one,) = clients(1, Patience(first_pause=0.001, longest_pause=HOURS))
    pool = Pool([one])
    place = pool.least_loaded(1, far())
    for _ in range(30):
        place.failed()
    place.worked()
    place.failed()
    deadline = time.monotonic() + 5.0
    pool.least_loaded(1, deadline)
    assert time.monotonic() < deadline
