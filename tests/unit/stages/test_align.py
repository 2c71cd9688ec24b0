"""Steps of the game with players of one tensor each: who moves, in which order, and what controls see.

Blind to several ranks and to the models; ``tests/integration/test_game.py`` plays with those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.stages.objective import CorrectionConfig, PolicyObjective
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.engine.provider import StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.held_out import GREEDY, SAMPLED
from prism_megatron.game.credit import GroupCredit, credit_groups
from prism_megatron.game.judge import Judgement, JudgePlan
from prism_megatron.game.judged_rows import ScoreRow, dropout_key
from prism_megatron.game.replay import ReplayBuffer
from prism_megatron.game.scoring_plan import TrunkCost
from prism_megatron.run.exports import Exports
from prism_megatron.run.session import Session
from prism_megatron.sampling.exam import ExamTimes, Sitting
from prism_megatron.sampling.handover import Handover
from prism_megatron.sampling.queue import SampledStep, Staleness
from prism_megatron.stages.align.build import _plan
from prism_megatron.stages.align.plan import AlignPlan, Players
from prism_megatron.stages.align.rows import AlignStep, observation_of
from prism_megatron.stages.align.stage import Alignment
from prism_megatron.types import RolloutGroup
from tests.unit.game.tiny_game import Bigram, Scorer, form, group, invalid, response, world_of_one
from tests.unit.stages.align_given import GROUPS, NUM_TOKENS, TEMPERATURE, given_credits, learning, responses

SEED = 3


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.mark.parametrize(("rule", "moves"), [("zero", False), ("release", True)])
def test_a_step_without_a_valid_rollout_moves_the_policy_only_as_released(world: World, rule: Any, moves: bool) -> None:
    table = Table(GameConfig(all_invalid_group=rule), groups=[group(response([8], [9]), invalid(10), invalid(11, 12))])
    table.play(range(1), world)
    assert table.policy_is_as_before != moves == ("policy steps" in table.calls)


@dataclass
class Answers:
    """Takes weights; says when it sleeps and wakes."""

    calls: list[str]
    expert_layout: str = "transformers"

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        assert [name for name, _ in tensors] == ["weight"]
        self.calls.append(f"update {version}")

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None:
        self.calls.append("close")


@dataclass
class Rounds:
    """A queue that has the same groups for every step."""

    calls: list[str]
    groups: Sequence[RolloutGroup] = tuple(GROUPS)

    def take(self, step: int) -> SampledStep:
        self.calls.append(f"take {step}")
        examples = [Example(one.prompt, one.reference) for one in self.groups]
        return SampledStep(examples, self.groups, 4, Staleness(0.0, 0, 0.0))

    def begin_again(self) -> None:
        self.calls.append("begin again")


@dataclass
class Table:
    """Two players and all that is called, in order."""

    game: GameConfig
    weight: float = 1.0
    load_balance: float = 0.0
    objective: PolicyObjective | None = None
    groups: Sequence[RolloutGroup] = tuple(GROUPS)
    exam: Any = None
    calls: list[str] = field(default_factory=list)
    told: list[AlignStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy: Any = Bigram(self.calls)
        self.discriminator: Any = Scorer(self.weight, calls=self.calls)
        self.before = self.policy.weight.detach().clone()

    @property
    def policy_is_as_before(self) -> bool:
        return torch.equal(self.policy.weight, self.before)

    def play(self, steps: range, world: World) -> None:
        rollout_engine: Any = Answers(self.calls)
        queue: Any = Rounds(self.calls, self.groups)
        prompts: Any = SimpleNamespace(identity={}, counts={}, probe=None, exam=self.exam)
        handover = Handover(self.policy, rollout_engine, 77, lambda version: self.calls.append(f"check {version}"))
        session: Any = Session(world, Path(), quiet=True)
        session.go_back = lambda _engines: self.calls.append("roll back")
        judging = JudgePlan(
            form(), 1000, score_regulariser=self.game.score_regulariser, seed=SEED, load_balance=self.load_balance
        )
        stage = Alignment(
            Players(self.policy, self.discriminator, rollout_engine, queue, handover),
            AlignPlan(self.game, judging, learning(objective=self.objective), seed=SEED, steps=steps.stop),
            prompts,
            Exports({}, "", "", Renderer.from_folder(MINI_FOLDER / "policy")),
            session,
        )
        for step in steps:
            outcome = stage.play(step)
            assert stage.last is not None
            self.calls.append(f"told {step}")
            self.told.append(stage.last)
            if outcome.verdict == "stop":
                break


JUDGED = ["discriminator learns", "discriminator steps"]
EXPORTS = "policy exports transformers by 77, what changed"


def test_a_step_goes_in_its_order(world: World) -> None:
    """Claim: the engine sleeps until training is over and it has the new weights, whose version is the steps played."""
    table = Table(GameConfig())
    table.play(range(6, 7), world)
    handed = [EXPORTS, "update 7", "wake", "check 7"]
    assert table.calls == ["take 6", "sleep", *JUDGED, "policy learns", "policy steps", *handed, "wake", "told 6"]
    assert not table.policy_is_as_before
    assert table.told[0].verdict == "go on"
    assert table.told[0].policy.sums["gap/image/tokens"] == 8, "tokens of version 4, which the queue says is trained"


@pytest.mark.parametrize("game", [GameConfig(), GameConfig(freeze_policy=True)], ids=["learns", "rests"])
def test_held_out_prompts_are_asked_of_an_engine_that_is_awake(world: World, game: GameConfig) -> None:
    """Claim: it has the weights of after the step then, whether they have changed in it or not."""
    calls: list[str] = []

    def sit(step: int, *, ends: bool) -> Sitting:
        calls.append(f"asked {step}{' at the end' if ends else ''}")
        row: Figures = dict.fromkeys(("eval/prompts", GREEDY, SAMPLED, "eval/sampled/format"), 0.5)
        return Sitting(row, best=True)

    table = Table(game, exam=SimpleNamespace(times=ExamTimes(steps=9, every=2, save_every=9), sit=sit), calls=calls)
    table.play(range(2), world)
    step = [call for call in calls[calls.index("take 1") :] if call.startswith(("update", "sleep", "wake", "asked"))]
    assert step == ["sleep", *([] if game.freeze_policy else ["update 2", "wake"]), "wake", "asked 1"]
    assert "asked 0" not in calls


def test_all_that_is_drawn_in_a_step_is_keyed_by_the_runs_seed_and_the_step(world: World) -> None:
    """Claim: dropout, shuffled scores and what is replayed are those of seed and step, however the run got there."""
    game, steps = GameConfig(shuffle_scores=True, replay_prompts=1, replay_steps=9), range(6, 14)
    table, replay = Table(game), ReplayBuffer(game, seed=SEED)
    table.play(steps, world)
    for told, batches in zip(table.told, table.discriminator.passes, strict=True):
        keys = {key for batch in batches for key in batch.extras["dropout_key"].tolist()}
        assert dropout_key(SEED, told.step, ScoreRow(1, 1, None)) in keys
        expected = credit_groups(GROUPS, told.judgement, game, seed=SEED, step=told.step, version=0)
        for one, other in zip(told.credits, expected, strict=True):
            assert torch.equal(one.advantages.mixed_N, other.advantages.mixed_N)
        drawn = replay.draw(told.step)
        assert [group.prompt.id for group in told.replayed] == [group.prompt.id for group in drawn]
        replay.add(told.step, GROUPS)


def test_load_is_balanced_as_the_plan_says(world: World) -> None:
    table = Table(GameConfig(), load_balance=0.25)
    table.play(range(1), world)
    for batch in table.discriminator.passes[0]:
        torch.testing.assert_close(batch.extras["load_balance_weight"], 0.25 * batch.extras["sequence_share"])


def test_a_policy_that_rests_is_only_looked_at(world: World) -> None:
    table = Table(GameConfig(freeze_policy_steps=(1, 2)))
    table.play(range(3), world)
    assert [step.policy.result is None for step in table.told] == [False, True, False]
    assert [call for call in table.calls if call.startswith("update")] == ["update 1", "update 3"]


def test_versions_of_a_step_are_those_of_before_it(world: World) -> None:
    """The discriminator that judged is the one of the step before; the policy is the oldest that drew a token."""
    table = Table(GameConfig(freeze_discriminator_steps=(1, 2)))
    table.play(range(3), world)
    assert [step.discriminator_version for step in table.told] == [0, 1, 1]
    assert [step.sampled_version for step in table.told] == [0, 0, 0]
    credited = [GroupCredit(given_credits()[0].advantages, 9, versions) for versions in ((5, 4), (3, 6))]
    step = replace(table.told[0], credits=credited)
    assert (step.sampled_version, step.discriminator_version) == (3, 9)


def test_what_a_step_played_is_replayed_in_the_next(world: World) -> None:
    table = Table(GameConfig(replay_prompts=5))
    table.play(range(2), world)
    assert [len(step.replayed) for step in table.told] == [0, 2]
    assert [step.judgement.sums["perception/pairs"] for step in table.told] == [3, 6]


def test_a_correction_is_of_the_policy_before_its_update(world: World) -> None:
    """Claim: the step first asks for log-probs, then weighs every token of its rollouts by them, and reports it."""
    correction = CorrectionConfig("token-mask", correction_low=0.3, correction_high=2.0)
    table = Table(GameConfig(), objective=PolicyObjective(correction=correction))
    before = torch.log_softmax(table.policy.weight.detach().double() / TEMPERATURE, dim=-1)
    table.play(range(1), world)
    weights = [
        math.exp(float(before[previous, token]) - GROUPS[g].rollouts[r].logprobs[place])
        for g, r, place, token, previous in responses()
    ]
    kept = [weight for weight in weights if 0.3 <= weight <= 2.0]
    assert 0 < len(kept) < NUM_TOKENS
    (told,) = table.told
    assert table.calls.index("policy is asked") < table.calls.index("policy learns")
    assert told.policy.sums["correction/kept_tokens"] == len(kept)
    assert told.policy.sums["correction/weight_sum"] == pytest.approx(sum(kept), rel=1e-5)
    assert told.policy.sums["importance/tokens"] == NUM_TOKENS, "the mismatch is that of all"


def test_the_configuration_s_correction_and_temperature_reach_the_update() -> None:
    correction = CorrectionConfig("geometric-mask", correction_veto=1e-3)
    rollout_ = replace(MINI_ALIGN.rollout, temperature=0.7)
    plan = _plan(replace(MINI_ALIGN, correction=correction, rollout=rollout_), form(), torch.float32)
    assert plan.learning.objective == PolicyObjective(correction=correction)
    assert plan.learning.temperature == 0.7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_leave_every_byte_of_the_policy(world: World, bad: float) -> None:
    """Claim: the policy is only looked at, both players go back, and what was drawn ahead is drawn again.

    The weights that are back are handed over as a new version.
    """
    table = Table(GameConfig(rollbacks=1), weight=bad)
    table.play(range(6, 7), world)
    handed = ["roll back", "begin again", EXPORTS, "update 7", "wake", "check 7"]
    assert table.calls == ["take 6", "sleep", *JUDGED, "policy looks", *handed, "wake", "told 6"]
    assert table.policy_is_as_before
    assert table.told[0].policy.result is None
    assert all(credit.advantages.all_invalid for credit in table.told[0].credits)


def test_a_dropped_gradient_of_the_policy_is_told(world: World) -> None:
    """With rollbacks the game goes back; without, it goes on and weights that did not change are not handed over."""
    for rollbacks, verdict in ((1, "roll back"), (0, "go on")):
        table = Table(GameConfig(rollbacks=rollbacks))
        table.policy.norms = [math.inf]
        table.play(range(1), world)
        assert table.told[0].verdict == verdict
        assert table.policy_is_as_before
        assert ("update 1" in table.calls) == (verdict == "roll back")


def test_a_game_that_has_settled_ends(world: World) -> None:
    table = Table(GameConfig(stop_gap_band=100.0, stop_gap_steps=2))
    table.play(range(5), world)
    assert [step.verdict for step in table.told] == ["go on", "stop"]


def test_controls_see_figures_of_the_rollouts_and_what_became_of_gradients(world: World) -> None:
    """By hand: three of four rollouts are valid; the references stand at 1 and 2, the rollouts at 0, 3 and 1."""
    del world
    scores: dict[tuple[int, int, int | None], float] = {
        (g, tower, None): 1.0 + tower for g in (0, 1) for tower in (0, 1)
    }
    for tower in (0, 1):
        scores.update({(0, tower, 0): 0.0, (0, tower, 1): 3.0, (1, tower, 1): 1.0})
    fine, dropped = StepResult(1.0, 0.1, True), StepResult(math.inf, 0.1, False)

    def outcome(results: Sequence[StepResult], policy: StepResult | None) -> Any:
        return observation_of(GROUPS, Judgement(scores, {}, results, TrunkCost(0, 1, 0, 1, 0)), policy)

    found = outcome([fine], fine)
    assert found.valid_share == 0.75
    assert found.accuracies == {"perception": pytest.approx(1.5 / 3), "reasoning": pytest.approx(2 / 3)}
    assert found.reward_gaps == {"perception": pytest.approx(-1 / 3), "reasoning": pytest.approx(2 / 3)}
    assert (found.discriminator_updated, found.finite_scores, found.finite_gradients) == (True, True, True)
    assert (outcome([], None).discriminator_updated, outcome([], None).finite_gradients) == (False, True)
    assert outcome([dropped, fine], fine).discriminator_updated
    for results, policy in (([fine], dropped), ([], dropped), ([fine, dropped], fine), ([dropped], None)):
        assert not outcome(results, policy).finite_gradients
