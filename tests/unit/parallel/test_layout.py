"""Rank arithmetic against a brute-force twin."""

from __future__ import annotations

import itertools

import pytest

from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.parallel.layout import data_parallel_size, place_of, share_of


@pytest.mark.parametrize(("tp", "pp", "world_size"), [(1, 1, 4), (2, 2, 8), (4, 2, 8), (1, 3, 6)])
def test_ranks_count_tp_first_then_dp_then_pp(tp: int, pp: int, world_size: int) -> None:
    """Claim: rank r is the r-th element of the product pp x dp x tp."""
    parallel = ParallelConfig(tp=tp, pp=pp)
    dp = data_parallel_size(world_size, parallel)
    expected = list(itertools.product(range(pp), range(dp), range(tp)))
    places = [place_of(rank, world_size=world_size, parallel=parallel) for rank in range(world_size)]
    assert [(place.pp_rank, place.dp_rank, place.tp_rank) for place in places] == expected


def test_a_world_that_does_not_divide_is_refused() -> None:
    """Claim: the message names the sizes."""
    with pytest.raises(ValueError, match="6 ranks are not a multiple of tp 2 x pp 2"):
        data_parallel_size(6, ParallelConfig(tp=2, pp=2))


@pytest.mark.parametrize(("length", "count"), [(0, 3), (2, 3), (7, 3), (8, 4)])
def test_shares_are_even_and_whole(length: int, count: int) -> None:
    """Claim: shares concatenate to the whole, in order, and their sizes differ by one at most."""
    items = list(range(length))
    shares = [share_of(items, index=index, count=count) for index in range(count)]
    assert list(itertools.chain.from_iterable(shares)) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
