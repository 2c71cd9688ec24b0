"""Supervised fine-tuning: cross-entropy on the response tokens of demonstrations (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from prism_megatron.data.stream.prefetch import Demonstration
from prism_megatron.engine.batch import Batch, Extra, beside_logits, label_places
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.provider import LossOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import sum_numbers
from prism_megatron.training.batches import BatchFormat, supervised_batch

_COUNTED = (Extra.LABEL_MASK, Extra.LEARNT_TOKENS)


@dataclass(frozen=True)
class SFTUpdate:
    """What one step came to: mean negative log-likelihood a label token, their number, and the optimizer's figures."""

    loss: float
    label_tokens: int
    result: StepResult
    experts: Mapping[str, float] = field(default_factory=dict)
    """figures of the experts and their routers; none of a dense policy"""


def cross_entropy(output: VocabularyOutput, batch: Batch, *, world: World, label_tokens: float) -> LossOutput:
    """Negative log-likelihood summed over label tokens, divided by the step's global count of them."""
    loss, _ = output.learn(
        lambda logprobs_n, *_: -logprobs_n.sum() / label_tokens,
        beside_logits(batch.input_ids_B_S, batch, world),
        label_places(batch, world),
        with_entropy=False,
    )
    return LossOutput(loss=loss, sums={"loss": loss.detach()})


def likelihood(output: VocabularyOutput, batch: Batch, *, world: World, num_sources: int) -> LossOutput:
    """Negative log-likelihood and label tokens of each source, by its number, summed; nothing is learned from it."""
    targets_B_L, mask_B_L, source_B_L = (
        beside_logits(values, batch, world)
        for values in (batch.input_ids_B_S, batch.extras[Extra.LABEL_MASK], batch.extras[Extra.SOURCE])
    )
    logprobs_B_L, _ = output.scores(targets_B_L, label_places(batch, world))
    sums: dict[str, Tensor] = {}
    for source in range(num_sources):
        here_B_L = mask_B_L * (source_B_L == source)
        sums |= {f"nll/{source}": -(logprobs_B_L * here_B_L).sum(), f"tokens/{source}": here_B_L.sum()}
    return LossOutput(loss=-logprobs_B_L.sum(), sums=sums)


def learn(policy: MegatronEngine, batches: Sequence[Batch], *, world: World) -> SFTUpdate:
    """One optimizer step on this data-parallel rank's micro-batches, of which every rank has as many.

    A step without a label anywhere changes nothing but the schedule's step: AdamW's momentum would move the weights.
    """
    own = {str(name): float(sum(batch.extras[name].sum() for batch in batches)) for name in _COUNTED}
    counts = sum_numbers(own, device=world.device, group=world.groups.dp)
    label_tokens = counts[Extra.LABEL_MASK]
    batches = [_sharing(batch, max(counts[Extra.LEARNT_TOKENS], 1.0)) for batch in batches]
    output = policy.forward_backward(batches, partial(cross_entropy, world=world, label_tokens=max(label_tokens, 1.0)))
    experts = {name: value for name, value in output.sums.items() if name.startswith("experts/")}
    return SFTUpdate(output.sums["loss"], int(label_tokens), policy.step(update=label_tokens > 0), experts)


def _sharing(batch: Batch, step_tokens: float) -> Batch:
    """The batch with each sequence's share of the step's tokens, by which routers' losses are means over the step."""
    shares_Q = batch.extras[Extra.LEARNT_TOKENS] / step_tokens
    return replace(batch, extras={**batch.extras, Extra.SEQUENCE_SHARE: shares_Q})


def measure(
    policy: MegatronEngine, batches: Sequence[Batch], sources: Sequence[str], *, world: World
) -> Mapping[str, tuple[float, int]]:
    """Mean negative log-likelihood a label token, and their number, of each source. The policy stays as it is."""
    sums = policy.forward(batches, partial(likelihood, world=world, num_sources=len(sources))).sums
    counts = [int(sums[f"tokens/{source}"]) for source in range(len(sources))]
    return {
        name: (sums[f"nll/{number}"] / max(count, 1), count)
        for number, (name, count) in enumerate(zip(sources, counts, strict=True))
    }


def teach(
    policy: MegatronEngine,
    demonstrations: Callable[[int], Sequence[Demonstration]],
    *,
    world: World,
    form: BatchFormat,
    rows_per_microbatch: int,
    steps: int,
    on_step: Callable[[int, SFTUpdate], None],
) -> None:
    """Run ``steps`` optimizer steps; ``demonstrations(step)`` gives this data-parallel rank's share of the step."""
    for step in range(steps):
        rows = demonstrations(step)
        batches = [
            supervised_batch([row for row, _ in part], [mask for _, mask in part], form=form)
            for part in (rows[i : i + rows_per_microbatch] for i in range(0, len(rows), rows_per_microbatch))
        ]
        on_step(step, learn(policy, batches, world=world))
