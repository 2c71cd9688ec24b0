"""Rank arithmetic against a brute-force twin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.parallel.layout import data_parallel_size, expert_groups, place_of, share_of, zigzag


@pytest.mark.parametrize(
    ("tp", "cp", "pp", "world_size"), [(1, 1, 1, 4), (2, 1, 2, 8), (4, 1, 2, 8), (1, 1, 3, 6), (2, 2, 2, 16)]
)
def test_ranks_count_tp_first_then_cp_dp_and_pp(tp: int, cp: int, pp: int, world_size: int) -> None:
    """Claim: rank r is the r-th element of the product pp x dp x cp x tp."""
    parallel = ParallelConfig(tp=tp, cp=cp, pp=pp)
    dp = data_parallel_size(world_size, parallel)
    expected = list(itertools.product(range(pp), range(dp), range(cp), range(tp)))
    places = [place_of(rank, world_size=world_size, parallel=parallel) for rank in range(world_size)]
    assert [(place.pp_rank, place.dp_rank, place.cp_rank, place.tp_rank) for place in places] == expected


@pytest.mark.parametrize(("ep", "etp", "pp", "world_size"), [(2, 1, 1, 2), (4, 1, 2, 8), (2, 2, 2, 16), (1, 4, 1, 8)])
def test_expert_groups_are_slices_of_the_world(ep: int, etp: int, pp: int, world_size: int) -> None:
    """Claim: rank r is the r-th element of the product pp x edp x ep x etp, and its groups are slices through it."""
    parallel = ParallelConfig(ep=ep, etp=etp, pp=pp)
    places = np.arange(world_size).reshape(pp, -1, ep, etp)
    for rank in range(world_size):
        groups = expert_groups(rank, world_size=world_size, parallel=parallel)
        p, d, e, t = (int(axis[0]) for axis in np.nonzero(places == rank))
        assert groups.ep == tuple(places[p, d, :, t])
        assert groups.etp == tuple(places[p, d, e, :])
        assert groups.etp_ep == tuple(places[p, d].ravel())
        assert groups.etp_ep_pp == tuple(places[:, d].ravel())
        assert groups.edp == tuple(places[p, :, e, t])


def test_a_world_that_experts_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="6 ranks are not a multiple of pp 1 x etp and ep 4"):
        expert_groups(0, world_size=6, parallel=ParallelConfig(ep=4))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("slots", [(8,), (16, 8, 24)])
def test_context_parallel_ranks_share_every_token_and_the_causal_work(cp_size: int, slots: tuple[int, ...]) -> None:
    """Claim: the ranks' tokens partition the row, and the positions inside their sequences add up alike."""
    held = [zigzag(slots, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]
    assert sorted(itertools.chain.from_iterable(part.tolist() for part in held)) == list(range(sum(slots)))
    depth = np.concatenate([np.arange(slot) for slot in slots])
    assert len({int(depth[part].sum()) for part in held}) == 1
    assert all(part.tolist() == sorted(part.tolist()) for part in held)


def test_a_sequence_that_does_not_divide_over_context_parallel_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence of 6 tokens does not divide into 2 · cp = 4 chunks"):
        zigzag([8, 6], cp_size=2, cp_rank=0)


def test_a_world_that_does_not_divide_is_refused() -> None:
    """Claim: the message names the sizes."""
    with pytest.raises(ValueError, match="6 ranks are not a multiple of tp 2 x cp 1 x pp 2"):
        data_parallel_size(6, ParallelConfig(tp=2, pp=2))


@pytest.mark.parametrize(("length", "count"), [(0, 3), (2, 3), (7, 3), (8, 4)])
def test_shares_are_even_and_whole(length: int, count: int) -> None:
    """Claim: shares concatenate to the whole, in order, and their sizes differ by one at most."""
    items = list(range(length))
    shares = [share_of(items, index=index, count=count) for index in range(count)]
    assert list(itertools.chain.from_iterable(shares)) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
