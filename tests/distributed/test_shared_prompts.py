"""A prompt that is read once for its group teaches what one that is read for each answer does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.testing import GlooWorld
from tests.distributed.shared_prompt_ranks import OBJECTIVES, Learnt, learnt

LAYOUTS: dict[str, tuple[int, ParallelConfig, int, int]] = {
    "one rank": (1, ParallelConfig(), 10_000, 2**25),
    "micro-batches": (1, ParallelConfig(), 40, 2**25),
    "chunks of the head": (1, ParallelConfig(), 10_000, 97 * 3),
    "DP2": (2, ParallelConfig(), 40, 2**25),
    "CP2": (2, ParallelConfig(cp=2), 10_000, 2**25),
    "TP2-PP2": (4, ParallelConfig(tp=2, pp=2, sp="on"), 60, 2**25),
    "PP2-VPP2-CP2": (4, ParallelConfig(pp=2, vpp=2, cp=2), 60, 2**25),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


@pytest.fixture(scope="module")
def expected(gloo: GlooWorld) -> Learnt:
    found: Learnt = gloo.run(learnt, False, 10_000, num_ranks=1)[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_log_probs_are_those_of_whole_rows(gloo: GlooWorld, expected: Learnt, layout: str) -> None:
    """Claim: losses, counts of bounds, every weight's gradient and every log-prob, in fewer tokens.

    Gradients within 2e-5 of their norm, log-probs within 1e-5: sums in fp32 of another order.
    """
    ranks, parallel, budget, chunk = LAYOUTS[layout]
    found = gloo.run(learnt, True, budget, chunk, num_ranks=ranks, parallel=parallel)
    for name in OBJECTIVES:
        wanted, mine = expected.gradients[name], found[0].gradients[name]
        assert wanted is not None and mine is not None
        off = float((mine - wanted).norm() / wanted.norm())
        print(f"{layout:20} {name}: gradient off {off:.1e}")
        assert off < 2e-5, name
        assert found[0].sums[name] == pytest.approx(expected.sums[name], rel=2e-5, abs=2e-5)
        assert found[0].sums[name]["clip/low"] + found[0].sums[name]["clip/high"] > 0
    for mine_T, wanted_T in zip(found[0].logprobs, expected.logprobs, strict=True):
        assert mine_T == pytest.approx(wanted_T, abs=1e-5)


def test_fewer_tokens_pass_through_the_model(gloo: GlooWorld, expected: Learnt) -> None:
    """Claim: of prompts with 11 and 19 tokens, 2 of 3 and 3 of 4 readings are spared, but for the last token."""
    (found,) = gloo.run(learnt, True, 10_000, num_ranks=1)
    assert expected.slots - found.slots == 2 * (11 - 1) + 3 * (19 - 1)
