"""Claim: what rank 0 decides holds for every process, and so does what it refuses; no other process decides anything.

Ranks are threads around a store of this process. Blind spot: the store between processes, and what torchrun makes of a
rank that ends (``tests/integration/test_recompute_auto.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not mark its re-exports

from prism_megatron.commands.starting import first_rank
from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.errors import CheckpointError, ConfigError, LostRankError, PrismError, SpentError

SIZE = 3


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Sequence[FirstRank]:
    """Processes of a world that nothing but rank 0 serves."""
    store = HashStore()
    monkeypatch.setattr(first_rank, "_rendezvous", lambda: store)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(SIZE))
    made = []
    for rank in range(SIZE):
        monkeypatch.setenv("RANK", str(rank))
        made.append(FirstRank())
    return made


def outcomes(ranks: Sequence[FirstRank], decide: Callable[[], str]) -> list[str | Exception]:
    """What every rank comes to."""

    def one(rank: FirstRank) -> str | Exception:
        try:
            with rank as first:
                return first.decides(decide)
        except (PrismError, ZeroDivisionError) as error:
            return error

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(one, ranks))


def test_one_decision_is_everyones(ranks: Sequence[FirstRank]) -> None:
    """Claim: it is made once, and rank 0 leaves no sooner than everyone has heard."""
    made: list[int] = []

    def decide() -> str:
        made.append(1)
        return "full"

    assert outcomes(ranks, decide) == ["full"] * SIZE
    assert made == [1]


@pytest.mark.parametrize("error", [ConfigError("rank 0 needs 9 GiB"), SpentError("enough")], ids=["2", "3"])
def test_what_rank_0_refuses_ends_all_alike(error: PrismError, ranks: Sequence[FirstRank]) -> None:
    """Claim: the words and the status are the same on every rank."""

    def decide() -> str:
        raise error

    found = outcomes(ranks, decide)
    assert found[0] is error
    assert [(str(one), getattr(one, "status", None)) for one in found] == [(str(error), error.status)] * SIZE


def test_a_failure_of_rank_0_ends_the_others_too(ranks: Sequence[FirstRank]) -> None:
    """Claim: an exception that nobody foresaw stays rank 0's, whose traceback is printed; nobody waits for ever."""
    found = outcomes(ranks, lambda: str(1 // 0))
    assert isinstance(found[0], ZeroDivisionError)
    assert all("rank 0 failed before the run began" in str(one) for one in found[1:])
    assert [getattr(one, "status", None) for one in found[1:]] == [1] * (SIZE - 1)


def test_rank_0_keeps_its_store_until_all_have_heard(
    ranks: Sequence[FirstRank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: the process that serves the store goes last; it waits as often as there is somebody left to hear."""
    heard: list[str] = []
    later = iter(ranks[1:])
    monkeypatch.setattr(time, "sleep", lambda _seconds: heard.append(next(later).decides(lambda: "no")))
    with ranks[0] as first:
        first.decides(lambda: "none")
        assert heard == []
    assert heard == ["none"] * (SIZE - 1)


def test_a_store_that_is_gone_ends_the_wait(ranks: Sequence[FirstRank], monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: where rank 0 served the store and was killed, the others say so."""
    from torch.distributed import DistNetworkError

    class Gone:
        def check(self, _keys: Sequence[str]) -> bool:
            raise DistNetworkError("connection reset")

    monkeypatch.setattr(first_rank, "_rendezvous", Gone)
    with pytest.raises(LostRankError, match="rank 0 ended before") as found:
        ranks[1].decides(lambda: "no")
    assert found.value.speaker == 1


def test_one_process_decides_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delattr(first_rank, "_rendezvous")
    with FirstRank() as first:
        assert first.decides(lambda: "none") == "none"
        with pytest.raises(CheckpointError):
            first.decides(_refuse)


def _refuse() -> str:
    raise CheckpointError("no such checkpoint")
