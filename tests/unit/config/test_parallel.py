"""What follows from a layout's sizes, by hand."""

from __future__ import annotations

import pytest

from prism_megatron.config.engine.parallel import ParallelConfig


@pytest.mark.parametrize(
    ("parallel", "multiple"),
    [
        (ParallelConfig(), 1),
        (ParallelConfig(tp=4, pp=3), 4),
        (ParallelConfig(cp=3), 6),
        (ParallelConfig(tp=2, cp=3), 12),
    ],
)
def test_every_rank_of_a_sequence_has_two_chunks_that_divide(parallel: ParallelConfig, multiple: int) -> None:
    """In zigzag shares a context-parallel rank holds one chunk from either end."""
    assert parallel.length_multiple == multiple


def test_only_the_interleaved_schedule_takes_whole_rounds() -> None:
    assert ParallelConfig(pp=3).microbatches_of_a_rank == 1
    assert ParallelConfig(pp=3, vpp=2).microbatches_of_a_rank == 3


def test_experts_are_whole_on_ranks_that_share_them_out() -> None:
    """By default; what is asked for goes first, also where it is 1."""
    assert ParallelConfig(tp=4).expert_tp == 4
    assert ParallelConfig(tp=4, ep=2).expert_tp == 1
    assert ParallelConfig(tp=4, ep=2, etp=2).expert_tp == 2
    assert ParallelConfig(tp=4, etp=1).expert_tp == 1


def test_sequence_parallelism_by_itself_is_for_experts() -> None:
    """And never without tensor parallelism, whatever is asked for."""
    found = {
        sp: [ParallelConfig(tp=2, sp=sp).sequence_parallel(experts=experts) for experts in (True, False)]
        for sp in ("auto", "on", "off")
    }
    assert found == {"auto": [True, False], "on": [True, True], "off": [False, False]}
    assert not ParallelConfig(tp=1, sp="on").sequence_parallel(experts=True)
