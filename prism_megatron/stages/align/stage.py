"""Stage 2, alignment: the policy answers, the discriminator ranks the reference above the answers, each learns.

One step is sample -> score and train the discriminator -> advantages -> train the policy -> hand the weights over
(method notes, section 4). Every rank holds all rollout groups of a step, so global denominators need no collective.
With rollouts drawn ahead (``--rollout-ahead``) a step is not strictly on-policy. Its loss is not corrected for that;
how far off-policy it was is reported, by versions and by importance weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from prism_megatron.advantages import GroupAdvantages
from prism_megatron.config.game import GameConfig
from prism_megatron.data.loader import Example
from prism_megatron.engine.batch import Batch, beside_logits
from prism_megatron.engine.engine import DEFAULT_BUCKET_BYTES, MegatronEngine
from prism_megatron.engine.logprobs import vocab_parallel_scores
from prism_megatron.engine.provider import LossOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import tower_figures
from prism_megatron.game.controls import Outcome, Verdict
from prism_megatron.game.credit import GroupReward, group_rewards, token_advantages
from prism_megatron.game.figures import judged_groups
from prism_megatron.game.judge import Judgement, judge_and_train
from prism_megatron.game.memory import GameMemory
from prism_megatron.losses.importance import importance_weights
from prism_megatron.losses.logprob_gap import logprob_gap
from prism_megatron.losses.policy import policy_gradient_loss
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.sampling.queue import RolloutQueue, SampledStep
from prism_megatron.training.batches import TOWER_NAMES, TOWERS, BatchFormat, policy_batch
from prism_megatron.training.microbatches import of_rank, plan_rows
from prism_megatron.types import PreferenceGroup, RolloutGroup


@dataclass(frozen=True)
class AlignStep:
    """Everything one step produced; observers read it and change nothing. ``None`` results mean "not updated".

    After the verdict "roll back" both players are those of the last good checkpoint again.
    """

    step: int
    sampled: SampledStep
    replayed: Sequence[PreferenceGroup]
    judgement: Judgement
    rewards: Sequence[GroupReward]
    policy_sums: Mapping[str, float]
    policy_result: StepResult | None
    verdict: Verdict

    @property
    def examples(self) -> Sequence[Example]:
        return self.sampled.examples

    @property
    def groups(self) -> Sequence[RolloutGroup]:
        return self.sampled.groups

    @property
    def sampled_version(self) -> int:
        """Oldest version of the policy that sampled: the number of the last step that updated it."""
        return min(version for reward in self.rewards for version in reward.policy_versions)

    @property
    def discriminator_version(self) -> int:
        """The discriminator that judged all groups of the step."""
        return self.rewards[0].discriminator_version


@dataclass(frozen=True, eq=False)
class Players:
    """The two trainable roles and the engine that samples for the policy."""

    policy: MegatronEngine
    discriminator: MegatronEngine
    rollout: RolloutEngine

    def engines(self) -> dict[str, MegatronEngine]:
        """What a checkpoint holds."""
        return {"policy": self.policy, "discriminator": self.discriminator}


def trust(_version: int) -> None:
    """The embedded engine's weights are in this process; nothing is asked."""


@dataclass(frozen=True)
class AlignPlan:
    """What a run keeps fixed from step to step."""

    game: GameConfig
    sampling: Sampling
    rollouts_per_prompt: int
    tokens_per_microbatch: int
    load_balance: float
    vocab_size: int
    seed: int
    form: BatchFormat
    gather_bytes: int = DEFAULT_BUCKET_BYTES
    """most of the weights that are gathered at a time when they are handed over"""
    check_served: Callable[[int], None] = trust
    """asked on all ranks with each new version; raises if the rollout engine does not have it"""


def align(
    players: Players,
    queue: RolloutQueue,
    plan: AlignPlan,
    memory: GameMemory,
    *,
    world: World,
    steps: range,
    timers: PhaseTimers,
    on_step: Callable[[AlignStep], None],
    roll_back: Callable[[], None] | None = None,
) -> None:
    """Play ``steps`` rounds, on the ``queue``'s rollouts of each, or fewer where the controls stop the game.

    ``on_step`` runs on all ranks; so does ``roll_back``, which gives both players their last good weights back and is
    needed where the rules allow rollbacks. Raises GameError as ``Controls.observe``.
    """
    controls, replay = memory.controls, memory.replay
    for step in steps:
        decision = controls.decide(step)
        with timers.phase("rollout"):
            sampled = queue.take(step)
            players.rollout.sleep()
        groups, replayed = sampled.groups, replay.draw(step)
        with timers.phase("discriminator"):
            judgement = judge_and_train(players.discriminator, groups, plan.game, world=world, form=plan.form,
                                        seed=plan.seed, step=step, updates=decision.discriminator_updates,
                                        replayed=replayed, load_balance=plan.load_balance,
                                        tokens_per_microbatch=plan.tokens_per_microbatch)  # fmt: skip
        rewards = group_rewards(groups, judgement, plan.game, seed=plan.seed, step=step,
                                version=controls.state.discriminator_version)  # fmt: skip
        with timers.phase("policy"):
            sums, result = train_policy(players.policy, groups, [reward.advantages for reward in rewards], plan,
                                        version=sampled.version, world=world,
                                        update=decision.update_policy and judgement.finite)  # fmt: skip
        verdict = controls.observe(step, outcome_of(groups, judgement, result))
        if verdict == "roll back":
            assert roll_back is not None, "--rollbacks needs somewhere to go back to"
            roll_back()
            queue.begin_again()
        if verdict == "roll back" or (result is not None and result.updated):
            with timers.phase("weight_sync"):
                weights = players.policy.export_hf(plan.gather_bytes, layout=players.rollout.expert_layout,
                                                   changed_only=True)  # fmt: skip
                players.rollout.update_weights(weights, step + 1)
                plan.check_served(step + 1)
        players.rollout.wake()
        replay.add(step, groups)
        on_step(AlignStep(step, sampled, replayed, judgement, rewards, sums, result, verdict))
        if verdict == "stop":
            break


def outcome_of(groups: Sequence[RolloutGroup], judgement: Judgement, policy_result: StepResult | None) -> Outcome:
    """What the controls look at, as rank 0 has it: ranks must not decide apart over the last digit of a float."""
    rollouts = sum(len(group.rollouts) for group in groups)
    results = [*judgement.results, *([] if policy_result is None else [policy_result])]
    figures = {
        name: tower_figures(judged_groups(groups, judgement.scores, [None] * len(groups), tower))
        for tower, name in zip(TOWERS, TOWER_NAMES, strict=True)
    }
    outcome = Outcome(
        accuracies={name: own["accuracy"] for name, own in figures.items()},
        reward_gaps={name: own["reward_gap"] for name, own in figures.items()},
        valid_share=sum(len(group.valid_rollouts) for group in groups) / rollouts,
        discriminator_updated=any(result.updated for result in judgement.results),
        finite_scores=judgement.finite,
        finite_gradients=all(result.updated for result in results),
    )
    return broadcast_object(outcome, source=0)


def train_policy(
    policy: MegatronEngine,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[GroupAdvantages],
    plan: AlignPlan,
    *,
    version: int,
    world: World,
    update: bool = True,
) -> tuple[Mapping[str, float], StepResult | None]:
    """One gradient step of policy ``version``, token-mean over all response tokens; on-policy if these are its own.

    Without ``update`` its figures are measured and nothing else. Without a valid rollout in the whole step there is no
    reward, and the policy is not updated, unless groups without one are punished as the release does.
    """
    tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    loss = partial(policy_loss, world=world, plan=plan, token_count=float(tokens))
    batches = policy_batches(groups, advantages, plan, version=version, world=world)
    if not update:
        output = policy.forward(batches, loss)
        return {**output.sums, **output.maxima}, None
    output = policy.forward_backward(batches, loss)
    rewarded = any(group.valid_rollouts for group in groups) or plan.game.all_invalid_group == "release"
    return {**output.sums, **output.maxima}, policy.step() if rewarded else None


def policy_batches(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[GroupAdvantages],
    plan: AlignPlan,
    *,
    version: int,
    world: World,
) -> list[Batch]:
    """This data-parallel rank's micro-batches of prompts and rollouts, packed up to the budget."""
    rows = [(g, r) for g, group in enumerate(groups) for r in range(len(group.rollouts))]
    lengths = [len(groups[g].prompt.token_ids) + len(groups[g].rollouts[r].token_ids) for g, r in rows]
    costs = [plan.form.slot(length) for length in lengths]
    microbatches = plan_rows(costs, budget=plan.tokens_per_microbatch, rounds_of=world.microbatch_rounds)
    batches = []
    for numbers in of_rank(microbatches, dp_rank=world.dp_rank, dp_size=world.dp_size):
        part = [rows[i] for i in sorted(numbers, key=lambda i: costs[i])]
        answers = [(groups[g], groups[g].rollouts[r]) for g, r in part]
        per_token = [token_advantages(groups[g].rollouts[r], r, advantages[g], plan.game) for g, r in part]
        batches.append(policy_batch(answers, per_token, version=version, form=plan.form))
    return batches


def policy_loss(logits_L_B_V: Tensor, batch: Batch, *, world: World, plan: AlignPlan, token_count: float) -> LossOutput:
    """Policy gradient under the sampling temperature; also how far rollout and trainer log-probs are apart.

    The gap is that of tokens from the policy being trained, where it must vanish; importance weights are those of all.
    """
    beside = partial(beside_logits, batch=batch, world=world)
    logprobs_B_L, entropy_B_L = vocab_parallel_scores(
        logits_L_B_V,
        beside(batch.input_ids_B_S),
        tp_group=world.groups.tp,
        vocab_size=plan.vocab_size,
        temperature=plan.sampling.temperature,
    )
    mask_B_L = beside(batch.extras["label_mask"])
    result = policy_gradient_loss(logprobs_B_L, beside(batch.extras["advantages"]), mask_B_L, token_count=token_count)
    sums = {
        "policy_loss": result.loss.detach(),
        "entropy": (entropy_B_L.detach() * mask_B_L).sum() / token_count,
    }
    rollout_logprobs_B_L = beside(batch.extras["rollout_logprobs"])
    weights = importance_weights(logprobs_B_L, rollout_logprobs_B_L, mask_B_L)
    sums |= {"importance/tokens": weights.tokens, "importance/sum": weights.total,
             "importance/squares": weights.squares, "importance/truncated": weights.truncated}  # fmt: skip
    maxima = {"importance/max": weights.largest}
    image_B_L, on_policy_B_L = (beside(batch.extras[name]) for name in ("image_mask", "on_policy_mask"))
    for kind, kind_mask_B_L in (("text", mask_B_L - image_B_L), ("image", image_B_L)):
        gap = logprob_gap(logprobs_B_L, rollout_logprobs_B_L, kind_mask_B_L * on_policy_B_L)
        sums |= {f"gap/{kind}/tokens": gap.tokens, f"gap/{kind}/sum": gap.absolute, f"gap/{kind}/kl": gap.kl}
        maxima[f"gap/{kind}/max"] = gap.largest
    return LossOutput(loss=result.loss, sums=sums, maxima=maxima)
