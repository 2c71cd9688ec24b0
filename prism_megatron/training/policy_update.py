"""The policy's half of a step: one gradient step on an experience, whatever its advantages come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from prism_megatron.engine.batch import Batch, Extra, beside_logits
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import Chosen, VocabularyOutput
from prism_megatron.engine.provider import LossOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.losses.importance import importance_weights
from prism_megatron.losses.logprob_gap import logprob_gap
from prism_megatron.losses.policy import policy_gradient_loss
from prism_megatron.training.batches import BatchFormat, policy_batch
from prism_megatron.training.experience import Experience
from prism_megatron.training.microbatches import of_rank, plan_rows


@dataclass(frozen=True)
class PolicyObjective:
    """What is maximised: the policy gradient of the advantages, as a mean over all response tokens.

    Example: ``PolicyObjective(temperature=0.8)`` for rollouts that were drawn at 0.8.
    """

    temperature: float = 1.0
    """log-probs are those under the temperature that the rollouts were drawn at"""


@dataclass(frozen=True)
class UpdatePlan:
    """What updating a policy keeps fixed from step to step."""

    objective: PolicyObjective
    form: BatchFormat
    tokens_per_microbatch: int
    """token slots that one forward and backward pass holds at most"""


@dataclass(frozen=True)
class PolicyUpdate:
    """Figures of the whole step, equal on every rank; ``result`` is None where the policy was not updated."""

    sums: Mapping[str, float]
    result: StepResult | None

    @property
    def updated(self) -> bool:
        """Whether the policy is another one now: a gradient that is not finite changes nothing."""
        return self.result is not None and self.result.updated


def update_policy(policy: MegatronEngine, experience: Experience, plan: UpdatePlan, *, world: World) -> PolicyUpdate:
    """One optimizer step, token-mean over all response tokens; on-policy where ``experience.version`` drew them."""
    output = policy.forward_backward(policy_batches(experience, plan, world=world), _loss(experience, plan, world))
    return PolicyUpdate({**output.sums, **output.maxima}, policy.step())


def measure_policy(policy: MegatronEngine, experience: Experience, plan: UpdatePlan, *, world: World) -> PolicyUpdate:
    """The figures of :func:`update_policy` of a policy that stays as it is."""
    output = policy.forward(policy_batches(experience, plan, world=world), _loss(experience, plan, world))
    return PolicyUpdate({**output.sums, **output.maxima}, None)


def _loss(experience: Experience, plan: UpdatePlan, world: World) -> partial[LossOutput]:
    return partial(policy_loss, world=world, plan=plan, token_count=float(experience.response_tokens))


def policy_batches(experience: Experience, plan: UpdatePlan, *, world: World) -> list[Batch]:
    """This data-parallel rank's micro-batches of prompts and rollouts, packed up to the budget."""
    rows = experience.rows
    costs = [plan.form.slot(len(row.prompt.token_ids) + len(row.rollout.token_ids)) for row in rows]
    microbatches = plan_rows(costs, budget=plan.tokens_per_microbatch, rounds_of=world.microbatch_rounds)
    return [
        policy_batch(
            [rows[i] for i in sorted(numbers, key=lambda i: costs[i])], version=experience.version, form=plan.form
        )
        for numbers in of_rank(microbatches, dp_rank=world.dp_rank, dp_size=world.dp_size)
    ]


def policy_loss(
    output: VocabularyOutput, batch: Batch, *, world: World, plan: UpdatePlan, token_count: float
) -> LossOutput:
    """Policy gradient under the sampling temperature; also how far rollout and trainer log-probs are apart.

    The gap is that of tokens from the policy being trained, where it must vanish; importance weights are those of all.
    """
    beside = partial(beside_logits, batch=batch, world=world)
    mask_B_L, advantages_B_L = beside(batch.extras[Extra.LABEL_MASK]), beside(batch.extras[Extra.ADVANTAGES])

    def token_loss(logprobs_n: Tensor, _entropy_n: Tensor, of: Chosen) -> Tensor:
        return policy_gradient_loss(logprobs_n, of(advantages_B_L), of(mask_B_L), token_count=token_count).loss

    loss, (logprobs_B_L, entropy_B_L) = output.learn(
        token_loss, beside(batch.input_ids_B_S), mask_B_L, temperature=plan.objective.temperature
    )
    sums = {"policy_loss": loss.detach(), "entropy": entropy_B_L.sum() / token_count}
    rollout_logprobs_B_L = beside(batch.extras[Extra.ROLLOUT_LOGPROBS])
    weights = importance_weights(logprobs_B_L, rollout_logprobs_B_L, mask_B_L)
    sums |= {"importance/tokens": weights.tokens, "importance/sum": weights.total,
             "importance/squares": weights.squares, "importance/truncated": weights.truncated,
             "importance/clamped": weights.clamped}  # fmt: skip
    maxima = {"importance/max": weights.largest}
    image_B_L, on_policy_B_L = (beside(batch.extras[name]) for name in (Extra.IMAGE_MASK, Extra.ON_POLICY_MASK))
    for kind, kind_mask_B_L in (("text", mask_B_L - image_B_L), ("image", image_B_L)):
        gap = logprob_gap(logprobs_B_L, rollout_logprobs_B_L, kind_mask_B_L * on_policy_B_L)
        sums |= {f"gap/{kind}/tokens": gap.tokens, f"gap/{kind}/sum": gap.absolute, f"gap/{kind}/kl": gap.kl}
        maxima[f"gap/{kind}/max"] = gap.largest
    return LossOutput(loss=loss, sums=sums, maxima=maxima)
