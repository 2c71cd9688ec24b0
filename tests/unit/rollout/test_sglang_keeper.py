"""Who starts a lost server again, by a clock that a test sets and a store of its own. No server is there."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # offered, not in __all__

from prism_megatron.errors import RolloutError
from prism_megatron.rollout.sglang.board import Board
from prism_megatron.rollout.sglang.keeper import Keeper

A, B, C = "http://a", "http://b", "http://c"


class Own:
    """This process's own server."""

    urls = (A,)

    def __init__(self) -> None:
        self.replaced: list[str] = []

    def supervises(self, url: str) -> bool:
        return url == A

    def replace(self, url: str) -> bool:
        self.replaced.append(url)
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_each_server_is_replaced_by_who_supervises_it() -> None:
    """Its own by this process, which then gives it the weights; the others are asked for, and are out until then."""
    own, board = Own(), Board(HashStore())
    keeper = Keeper([A, B], own, board, return_seconds=1.0)
    assert keeper.foreign == (B,)
    assert keeper.replace(A) and own.replaced == [A] and not keeper.is_out(A)
    assert keeper.replace(B) and board.times_asked(B) == 1 and keeper.out() == {B}
    assert board.times_asked(A) == 0
    keeper.admit(B)
    assert not keeper.out() and keeper.num_admitted == 1


def test_a_stranger_does_not_come_back() -> None:
    """A router's address is no server of the run's."""
    for board in (None, Board(HashStore())):
        keeper = Keeper([A, B], None, board, return_seconds=1.0)
        assert not keeper.comes_back(C) and not keeper.replace(C) and not keeper.out()


def test_who_has_given_up_is_heard_of_everywhere() -> None:
    """Claim: no process waits for a server that its supervisor starts no more."""
    store = HashStore()
    keeper = Keeper([A, B], None, Board(store), return_seconds=1.0)
    assert keeper.comes_back(A) and not keeper.is_attached(A)
    Board(store).give_up("server 0 died too often")
    for call in (keeper.comes_back, keeper.replace):
        with pytest.raises(RolloutError, match="server 0 died too often"):
            call(B)


def test_the_wait_begins_when_the_last_attached_server_falls_silent() -> None:
    clock = Clock()
    keeper = Keeper([A, B], None, None, return_seconds=10.0, clock=clock)
    assert keeper.is_attached(A) and keeper.comes_back(A)
    clock.now += 100.0
    assert keeper.comes_back(A), "the other is there"
    assert keeper.comes_back(B)
    clock.now += 9.9
    assert keeper.comes_back(A)
    clock.now += 0.1
    with pytest.raises(RolloutError, match=r"no server of --rollout-urls \(http://a, http://b\) has answered for 10 s"):
        keeper.comes_back(A)
    keeper.answered(B)
    assert keeper.comes_back(A) and keeper.comes_back(B)


def test_other_ranks_follow_the_one_that_hands_weights_over() -> None:
    keeper = Keeper([A, B], None, None, return_seconds=10.0)
    keeper.follow([B])
    assert keeper.is_out(B) and not keeper.is_out(A)
    keeper.follow([])
    assert not keeper.out()
