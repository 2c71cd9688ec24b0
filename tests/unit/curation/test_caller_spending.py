"""What calls cost, and that no more is spent than may be.

Blind spot: real endpoints, which count tokens in their own ways.
"""

from __future__ import annotations

import asyncio
import threading

import pytest

from prism_megatron.errors import SpentError, StoreError
from tests.unit.curation.asking import Opened, call, caller, model, only
from tests.unit.curation.mock_teacher import mock_teacher
from tests.waiting import wait_for

KEY = "sk-a-long-secret-key"


def test_cost_is_that_of_the_tokens(opened: Opened) -> None:
    """Claim: as the endpoint counts them; of an answer that is too long, the most that it may have."""
    with mock_teacher(only("right")) as teacher:
        response = opened.caller(model(teacher.url, price_in=2.0, price_out=10.0)).ask(call(1)).result(30.0)
        teacher.script = only("endless")
        cut = opened.caller(model(teacher.url, price_in=2.0, price_out=10.0)).ask(call(2)).result(30.0)
    assert response.prompt_tokens > 0 and response.answer_tokens > 0
    assert response.cost == pytest.approx((2.0 * response.prompt_tokens + 10.0 * response.answer_tokens) / 1e6)
    assert cut.cost == pytest.approx((2.0 * (1000 + 6) + 10.0 * 64) / 1e6)
    assert opened.store().totals().cost == pytest.approx(response.cost + cut.cost, abs=2e-9)


def test_what_may_be_spent_is_not_gone_beyond(opened: Opened) -> None:
    """Claim: once all responses in the store, another process's too, have cost so much, nothing begins; what is under
    way is waited for and stored; what is stored is answered still; with a higher limit it goes on."""
    with mock_teacher(only("right"), seconds=0.1) as teacher:
        dear = model(teacher.url, price_out=1e6, at_once=4)
        price = opened.caller(dear).ask(call(1000)).result(30.0).cost
        with pytest.raises(SpentError):
            opened.caller(dear, max_cost=0.5 * price).ask(call(0)).result(30.0)
        assert len(teacher.log) == 1, "another process has spent it"
        asker = opened.caller(dear, max_cost=2.5 * price)
        futures = [asker.ask(call(problem)) for problem in range(20)]
        errors = [future.exception(30.0) for future in futures]
        stopped = [error for error in errors if error is not None]
        store = opened.store()
        assert 2 <= errors.count(None) <= 5
        assert store.totals().responses == 1 + errors.count(None) == len(teacher.log)
        assert all(isinstance(error, SpentError) for error in stopped) and SpentError.status == 3
        assert f"--max-cost is {2.5 * price:g}; all of them are stored" in str(stopped[0])
        assert asker.ask(call(1000)).result(0).answered
        assert opened.caller(dear, max_cost=1000 * price).ask(call(19)).result(30.0).answered


def test_whoever_hears_that_all_is_spent_may_end(opened: Opened) -> None:
    """Claim: SpentError comes only after what was under way is stored."""
    with mock_teacher(only("right"), seconds=0.3) as teacher:
        asker = opened.caller(model(teacher.url, price_out=1e6, at_once=2), max_cost=1e-6)
        slow, quick = asker.ask(call(1)), None
        wait_for(lambda: len(teacher.log) == 1)
        teacher.seconds = 0.0
        quick = asker.ask(call(2))
        quick.result(30.0)
        with pytest.raises(SpentError):
            asker.ask(call(3)).result(30.0)
        assert slow.done() and opened.store().get(call(1).key) == slow.result()


def test_what_is_not_yet_stored_is_spent_all_the_same(opened: Opened) -> None:
    """Claim: while a response is on its way to the disk, no call begins in its place."""
    with mock_teacher(only("right"), seconds=0.05) as teacher:
        store, stored = opened.store(), threading.Event()
        asker = caller(store, model(teacher.url, price_out=1e6, at_once=1), max_cost=1e-6)
        first, second = asker.ask(call(1)), asker.ask(call(2))
        wait_for(lambda: len(teacher.log) == 1)
        store._writer.submit(lambda _: stored.wait(30.0))
        wait_for(lambda: asker.counts.tries["answered"] == 1)
        asker._loop.start(asyncio.sleep(0.05)).result(30.0)  # in which the second would take its place
        stored.set()
        assert first.result(30.0).answered
        with pytest.raises(SpentError):
            second.result(30.0)
        assert len(teacher.log) == 1
        asker.close()


def test_a_store_that_cannot_be_written_ends_it(opened: Opened) -> None:
    """Claim: no request is paid for whose answer has no place to go."""
    with mock_teacher(only("right")) as teacher:
        store = opened.store()
        asker = caller(store, model(teacher.url))
        asker.ask(call(1)).result(30.0)
        store._writer.close()
        for problem in (2, 3):
            with pytest.raises(StoreError, match="is closed"):
                asker.ask(call(problem)).result(30.0)
        assert len(teacher.log) == 1
        asker.close()
