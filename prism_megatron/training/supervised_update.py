"""Supervised fine-tuning: cross-entropy on the response tokens of demonstrations (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from prism_megatron.data.stream.prefetch import Demonstration
from prism_megatron.engine.batch import Batch, Extra, beside_logits
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.provider import LossOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import sum_numbers
from prism_megatron.training.batches import BatchFormat, supervised_batch


@dataclass(frozen=True)
class SFTUpdate:
    """What one step came to: mean negative log-likelihood a label token, their number, and the optimizer's figures."""

    loss: float
    label_tokens: int
    result: StepResult


def cross_entropy(output: VocabularyOutput, batch: Batch, *, world: World, label_tokens: float) -> LossOutput:
    """Negative log-likelihood summed over label tokens, divided by the step's global count of them."""
    targets_B_L, mask_B_L = (
        beside_logits(values, batch, world) for values in (batch.input_ids_B_S, batch.extras[Extra.LABEL_MASK])
    )
    loss, _ = output.learn(
        lambda logprobs_n, *_: -logprobs_n.sum() / label_tokens, targets_B_L, mask_B_L, with_entropy=False
    )
    return LossOutput(loss=loss, sums={"loss": loss.detach()})


def likelihood(output: VocabularyOutput, batch: Batch, *, world: World, num_sources: int) -> LossOutput:
    """Negative log-likelihood and label tokens of each source, by its number, summed; nothing is learned from it."""
    targets_B_L, mask_B_L, source_B_L = (
        beside_logits(values, batch, world)
        for values in (batch.input_ids_B_S, batch.extras[Extra.LABEL_MASK], batch.extras[Extra.SOURCE])
    )
    logprobs_B_L, _ = output.scores(targets_B_L, mask_B_L)
    sums: dict[str, Tensor] = {}
    for source in range(num_sources):
        here_B_L = mask_B_L * (source_B_L == source)
        sums |= {f"nll/{source}": -(logprobs_B_L * here_B_L).sum(), f"tokens/{source}": here_B_L.sum()}
    return LossOutput(loss=-logprobs_B_L.sum(), sums=sums)


def learn(policy: MegatronEngine, batches: Sequence[Batch], *, world: World) -> SFTUpdate:
    """One optimizer step on this data-parallel rank's micro-batches, of which every rank has as many.

    A step without a label anywhere changes nothing but the step count, whose update is that of a zero gradient.
    """
    own = float(sum(batch.extras[Extra.LABEL_MASK].sum() for batch in batches))
    label_tokens = sum_numbers({"tokens": own}, device=world.device, group=world.groups.dp)["tokens"]
    output = policy.forward_backward(batches, partial(cross_entropy, world=world, label_tokens=max(label_tokens, 1.0)))
    return SFTUpdate(output.sums["loss"], int(label_tokens), policy.step())


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
