"""A step of both players, however it is cut into micro-batches, on the shipped mini (blind spots: bf16, CUDA)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.game import scoring_plan
from prism_megatron.testing import GlooWorld
from prism_megatron.training.microbatches import of_rank
from prism_megatron.types import RolloutGroup
from tests.parity.align_ranks import sample
from tests.parity.scoring_ranks import (
    Judged,
    Setting,
    fingerprints_of_rounds,
    gradients_of_few,
    judged,
    offloaded_rounds,
    policy_gradients,
)
from tests.unit.game.tiny_game import form

ONE_RANK, DP2, EP2 = (1, ParallelConfig()), (2, ParallelConfig()), (2, ParallelConfig(ep=2))
PP2, CP2 = (2, ParallelConfig(pp=2)), (2, ParallelConfig(cp=2))
ALL, FEW, FEWER = 16384, 150, 90
BALANCE = 0.05
# fp32 sums in another order; measured about 5e-6 of a gradient's norm, and 1.2e-5 of the vision tower's least.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(2) as world:
        yield world


@pytest.fixture(scope="module")
def groups(gloo: GlooWorld) -> Sequence[RolloutGroup]:
    (sampled,) = gloo.run(sample, num_ranks=1)
    return list(sampled)


def run(
    gloo: GlooWorld, groups: Sequence[RolloutGroup], layout: tuple[int, ParallelConfig], setting: Setting
) -> list[Judged]:
    ranks, parallel = layout
    results: list[Judged] = gloo.run(judged, groups, setting, parallel=parallel, num_ranks=ranks)
    return results


@pytest.fixture(scope="module")
def whole(gloo: GlooWorld, groups: Sequence[RolloutGroup]) -> dict[float, Judged]:
    """The slow twin: one micro-batch of whole sequences; without and with load balancing."""
    return {balance: run(gloo, groups, ONE_RANK, Setting(ALL, balance))[0] for balance in (0.0, BALANCE)}


def assert_same(result: Judged, expected: Judged) -> None:
    assert result.scores.keys() == expected.scores.keys()
    for key, score in expected.scores.items():
        assert result.scores[key] == pytest.approx(score, abs=1e-5), key
    assert result.sums["discriminator_loss"] == pytest.approx(expected.sums["discriminator_loss"], rel=1e-5)
    norms = {name: float(gradient.norm()) for name, gradient in expected.gradients.items()}
    apart = {name: float((result.gradients[name] - expected.gradients[name]).norm()) for name in norms}
    assert all(apart[name] <= TOLERANCE * norm for name, norm in norms.items()), apart
    assert math.hypot(*apart.values()) <= 1e-5 * math.hypot(*norms.values())


@pytest.mark.parametrize(
    ("layout", "setting"),
    [
        (ONE_RANK, Setting(FEW, BALANCE)),
        (DP2, Setting(FEW, BALANCE)),
        (EP2, Setting(700, BALANCE)),
        (ONE_RANK, Setting(500, share_prompts=True)),
        (DP2, Setting(FEWER, share_prompts=True)),
        (ONE_RANK, Setting(FEWER, BALANCE, share_prompts=True)),
        (ONE_RANK, Setting(FEW, BALANCE, apart=True)),
        (DP2, Setting(FEWER, BALANCE, share_prompts=True, apart=True)),
        (PP2, Setting(FEWER, share_prompts=True, apart=True)),
        (CP2, Setting(FEWER, BALANCE, share_prompts=True, apart=True)),
    ],
    ids=[
        "references repeated",
        "DP2",
        "EP2",
        "shared prompts",
        "DP2, shared prompts",
        "shared prompts, balanced",
        "apart",
        "DP2, shared prompts, apart",
        "PP2, apart",
        "CP2, apart",
    ],
)
def test_a_step_does_not_depend_on_its_micro_batches(
    *,
    gloo: GlooWorld,
    groups: Sequence[RolloutGroup],
    whole: dict[float, Judged],
    layout: tuple[int, ParallelConfig],
    setting: Setting,
) -> None:
    """Scores, loss and every gradient equal those of one micro-batch, though references stand in several.

    The regulariser and load balancing count each of them once, and dropout (rate 0.1) draws the same; references that
    are apart teach as those beside their rollouts do. The tokens that passed the decoder are those that the metrics
    state.
    """
    results = run(gloo, groups, layout, setting)
    for result in results:
        assert_same(result, whole[setting.balance])
    cost = results[0].cost
    layers = layout[1].pp
    assert sum(result.trunk_tokens for result in results) == cost.trunk_tokens * layers
    assert cost.apart == setting.apart
    if setting.tokens <= FEW and not setting.apart:
        assert cost.references > 2 * len(groups), "blind: no reference is repeated"
    if setting.share_prompts and not setting.apart:
        assert cost.trunk_tokens < whole[0.0].cost.trunk_tokens


def compared_on(groups: Sequence[RolloutGroup], budget: int) -> list[set[tuple[int, int]]]:
    """Groups and towers that each of two ranks has rollouts of, where references are apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_plan, "WAYS", (scoring_plan.apart,))
        plan = scoring_plan.plan_scoring(groups, form(share_prompts=True), tokens_per_microbatch=budget, rounds_of=2)
    shares = [of_rank(plan.pairs, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    return [{(part.group, part.tower) for parts in own for part in parts} for own in shares]


def test_a_group_on_two_ranks_is_what_it_is_on_one(gloo: GlooWorld, groups: Sequence[RolloutGroup]) -> None:
    """Claim: a reference that is apart, on one rank, learns from the rollouts of both."""
    few = groups[:3]
    budget = next(budget for budget in range(30, 400) if set.intersection(*compared_on(few, budget)))
    (expected,) = run(gloo, few, ONE_RANK, Setting(ALL, BALANCE))
    for result in run(gloo, few, DP2, Setting(budget, BALANCE, share_prompts=True, apart=True)):
        assert_same(result, expected)


def test_load_balancing_shows_in_the_gradients(whole: dict[float, Judged]) -> None:
    """The comparisons above would notice a load-balancing loss that is counted twice."""
    router = next(name for name in whole[0.0].gradients if name.endswith("mlp.gate.weight"))
    without, balanced = (whole[balance].gradients[router] for balance in (0.0, BALANCE))
    assert float((balanced - without).norm()) > 100 * TOLERANCE * float(without.norm())


def test_a_frozen_tower_encodes_each_image_once(
    gloo: GlooWorld, groups: Sequence[RolloutGroup], whole: dict[float, Judged]
) -> None:
    """Over all micro-batches; a trained one once in each micro-batch that shows it. Other gradients are the same."""
    frozen, *_ = run(gloo, groups, ONE_RANK, Setting(FEW, freeze_vision=True))
    trained, *_ = run(gloo, groups, ONE_RANK, Setting(FEW))
    assert frozen.encoded_images == len(groups)
    assert trained.encoded_images > len(groups)
    assert frozen.scores == pytest.approx(trained.scores, abs=1e-5)
    for name, gradient in whole[0.0].gradients.items():
        if ".visual." in name:
            assert not frozen.gradients[name].any(), name
        else:
            assert float((frozen.gradients[name] - gradient).norm()) <= TOLERANCE * float(gradient.norm()), name


def test_on_policy_gradients_need_no_second_forward(gloo: GlooWorld, groups: Sequence[RolloutGroup]) -> None:
    """With old log-probs from a forward pass of their own every gradient is the same, in one micro-batch or many."""
    expected = None
    for tokens in (ALL, FEW):
        ((once, twice),) = gloo.run(policy_gradients, groups, tokens, num_ranks=1)
        expected = expected or twice
        for name, gradient in expected.items():
            norm = float(gradient.norm())
            assert float((once[name] - gradient).norm()) <= TOLERANCE * norm, name
            torch.testing.assert_close(once[name], twice[name], rtol=0, atol=1e-6 * norm + 1e-12)
    assert expected and any(float(gradient.norm()) > 0 for gradient in expected.values())


@pytest.mark.parametrize("answers", [1, 3])
def test_a_policy_learns_from_fewer_answers_than_ranks(
    gloo: GlooWorld, groups: Sequence[RolloutGroup], answers: int
) -> None:
    """Claim: gradients on DP2 are those of one rank, though the answers cannot be divided by two."""
    (expected,) = gloo.run(gradients_of_few, groups, answers, num_ranks=1)
    for gradients in gloo.run(gradients_of_few, groups, answers):
        for name, gradient in expected.items():
            assert float((gradients[name] - gradient).norm()) <= TOLERANCE * float(gradient.norm()), name
    assert any(float(gradient.norm()) > 0 for gradient in expected.values())


@pytest.mark.parametrize("parallel", [ParallelConfig(tp=2), ParallelConfig(ep=2)], ids=["TP2", "EP2·DP2"])
def test_a_step_of_one_player_changes_no_byte_of_the_other(
    gloo: GlooWorld, groups: Sequence[RolloutGroup], parallel: ParallelConfig
) -> None:
    """Hashes of parameters, gradient buffers and optimizer state on every rank, around each step of two rounds."""
    for seen in gloo.run(fingerprints_of_rounds, groups, 2, parallel=parallel):
        for hashes in seen:
            start, discriminated, done = hashes["policy"]
            assert start == discriminated != done
            start, discriminated, done = hashes["discriminator"]
            assert start != discriminated == done


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_offload_holds_nothing_and_changes_nothing(
    gloo: GlooWorld, groups: Sequence[RolloutGroup], dtype: torch.dtype, distributed: bool
) -> None:
    """After a step no byte of gradients and state is held; weights, moments and masters go on bit for bit."""
    parallel = ParallelConfig(distributed_optimizer=distributed)
    (((kept, without), (released, offloaded)),) = gloo.run(
        offloaded_rounds, groups[:1], dtype, parallel=parallel, num_ranks=1
    )
    assert kept > 0 == released
    assert len(without) > 100 and without == offloaded
