"""Stage 1, supervised fine-tuning: cross-entropy on the response tokens of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from prism_megatron.engine.batch import Batch, Extra, beside_logits
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import vocab_parallel_scores
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


def cross_entropy(
    logits_L_B_V: Tensor, batch: Batch, *, world: World, vocab_size: int, label_tokens: float
) -> LossOutput:
    """Negative log-likelihood summed over label tokens, divided by the step's global count of them."""
    targets = beside_logits(batch.input_ids_B_S, batch, world)
    scores = vocab_parallel_scores(logits_L_B_V, targets, tp_group=world.groups.tp, vocab_size=vocab_size)
    loss = -(scores.logprobs_B_L * beside_logits(batch.extras[Extra.LABEL_MASK], batch, world)).sum() / label_tokens
    return LossOutput(loss=loss, sums={"loss": loss.detach()})


def train(
    policy: MegatronEngine,
    demonstrations: Callable[[int], Sequence[Demonstration]],
    *,
    world: World,
    form: BatchFormat,
    vocab_size: int,
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
        loss = partial(cross_entropy, world=world, vocab_size=vocab_size, label_tokens=label_tokens)
        output = policy.forward_backward(batches, loss)
        result = policy.step()
        on_step(SFTStep(step, output.sums["loss"], int(label_tokens), result.grad_norm, result.lr))
