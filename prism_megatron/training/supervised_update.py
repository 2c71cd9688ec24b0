"""Stage 1, supervised fine-tuning: cross-entropy on the response tokens of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from prism_megatron.engine.batch import Batch, Extra, beside_logits
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import sum_numbers
from prism_megatron.training.batches import BatchFormat, supervised_batch
from prism_megatron.types import TokenSequence

Demonstration = tuple[TokenSequence, Sequence[float]]
"""A row and its label mask (1 on tokens to learn)."""


@dataclass(frozen=True)
class SFTStep:
    """What one step reports: mean negative log-likelihood per label token, and the optimizer's figures."""

    step: int
    loss: float
    label_tokens: int
    grad_norm: float
    lr: float


def cross_entropy(output: VocabularyOutput, batch: Batch, *, world: World, label_tokens: float) -> LossOutput:
    """Negative log-likelihood summed over label tokens, divided by the step's global count of them."""
    targets_B_L, mask_B_L = (
        beside_logits(values, batch, world) for values in (batch.input_ids_B_S, batch.extras[Extra.LABEL_MASK])
    )
    loss, _ = output.learn(lambda logprobs_n, *_: -logprobs_n.sum() / label_tokens, targets_B_L, mask_B_L)
    return LossOutput(loss=loss, sums={"loss": loss.detach()})


def train(
    policy: MegatronEngine,
    demonstrations: Callable[[int], Sequence[Demonstration]],
    *,
    world: World,
    form: BatchFormat,
    rows_per_microbatch: int,
    steps: int,
    on_step: Callable[[SFTStep], None],
) -> None:
    """Run ``steps`` optimizer steps; ``demonstrations(step)`` gives this data-parallel rank's share of the step."""
    for step in range(steps):
        rows = demonstrations(step)
        own_tokens = sum(sum(mask) for _, mask in rows)
        label_tokens = sum_numbers({"tokens": own_tokens}, device=world.device, group=world.groups.dp)["tokens"]
        batches = [
            supervised_batch([row for row, _ in part], [mask for _, mask in part], form=form)
            for part in (rows[i : i + rows_per_microbatch] for i in range(0, len(rows), rows_per_microbatch))
        ]
        loss = partial(cross_entropy, world=world, label_tokens=label_tokens)
        output = policy.forward_backward(batches, loss)
        result = policy.step()
        on_step(SFTStep(step, output.sums["loss"], int(label_tokens), result.grad_norm, result.lr))
