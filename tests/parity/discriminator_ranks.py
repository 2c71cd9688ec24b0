"""What each rank does in the discriminator's parity tests, through ``MegatronEngine``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from model_providers.moe_discriminator import routing
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.optimizer import OptimizerConfig
from prism_megatron.config.recompute import RecomputeConfig
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.engine.attention import Sequences, gather_tokens
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.experts import ExpertLayer
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.losses.discriminator import discriminator_loss
from tests.parity.discriminator_oracle import (
    BALANCE,
    DROPOUT,
    REGULARISER,
    TOWERS,
    Case,
    batch_of,
    pair_rows,
    tiny_shape,
)

KEEP_ALL = RecomputeConfig()


@dataclass(frozen=True)
class Options:
    """How a step is run."""

    balance: float = BALANCE
    pack: bool = False
    recompute: RecomputeConfig = KEEP_ALL


@dataclass(frozen=True)
class RankStep:
    """One step of a rank: scores of its prompts, the global loss, the gradient norm, full gradients by name."""

    scores: dict[int, Tensor]
    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]


def build(
    world: World, source: TensorSource, towers: Towers = TOWERS, recompute: RecomputeConfig = KEEP_ALL
) -> MegatronEngine:
    engine = MegatronEngine(
        name="discriminator",
        provider=DiscriminatorProvider(tiny_shape(), towers, head_dropout=DROPOUT, recompute=recompute),
        world=world,
        dtype=torch.float32,
        optimizer=OptimizerConfig(lr=0.0, weight_decay=0.0),
        total_steps=1,
    )
    engine.load_hf(source)
    return engine


def my_batches(world: World, case: Case, *, balance: float = BALANCE, pack: bool = False) -> dict[int, Batch]:
    """This data-parallel rank's micro-batches by prompt."""
    mine = range(world.dp_rank, len(case.prompts), world.dp_size)
    multiple = world.parallel.length_multiple
    return {p: batch_of(case, [p], multiple_of=multiple, balance=balance, pack=pack) for p in mine}


def train_step(world: World, source: TensorSource, case: Case, options: Options) -> RankStep:
    """Forward and backward over all prompts; without the distributed optimizer, so that gradients stay whole."""
    engine = build(world, source, recompute=options.recompute)
    batches = my_batches(world, case, balance=options.balance, pack=options.pack)

    def loss(scores_2_B: Tensor, batch: Batch) -> LossOutput:
        result = discriminator_loss(
            scores_2_B[1], pair_rows(batch), pair_counts=case.pair_counts, regulariser_coefficient=REGULARISER
        )
        return LossOutput(
            result.loss, {"loss": result.loss.detach() / world.parallel.cp}, {"scores": scores_2_B[0].detach()}
        )

    output = engine.forward_backward(list(batches.values()), loss)
    gradients = full_gradients(engine)
    norm = engine.step().grad_norm
    scores = {p: rows["scores"] for p, rows in zip(batches, output.rows, strict=True)}
    return RankStep(scores, output.sums["loss"], norm, gradients)


def last_hidden_states(world: World, source: TensorSource, case: Case) -> dict[int, Tensor]:
    """Hidden states ``[B, S, H]`` after the final norm by prompt, on the ranks of the last stage."""
    engine = build(world, source)
    batches = my_batches(world, case)
    seen: list[Tensor] = []

    def capture(_module: object, _inputs: object, output: Tensor) -> None:
        whole = output
        if engine.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(whole, group=world.groups.tp)
        if world.parallel.cp > 1:
            slots = list(batches.values())[len(seen)].row_slots()
            sequences = Sequences.of(slots, cp_size=world.parallel.cp, device=whole.device)
            whole = gather_tokens(whole, sequences, world.groups.cp)
        seen.append(whole.transpose(0, 1))

    if world.is_last_stage:
        engine.modules[-1].decoder.register_forward_hook(capture)
    engine.forward(list(batches.values()), lambda scores, _batch: LossOutput(scores.sum()))
    return dict(zip(batches, seen, strict=False))


@dataclass(frozen=True)
class Visits:
    """Tokens per *global* expert that this rank's dispatchers received, and gradient norms by tensor name."""

    tokens: list[int]
    gradient_norms: dict[str, float]


def visits_of_rows(world: World, source: TensorSource, case: Case, rows: Sequence[int], mask_ignored: bool) -> Visits:
    """Run some rows of prompt 0 and count what every layer's dispatcher hands to each expert.

    ``mask_ignored`` breaks the routing on purpose: every token then sees all experts.
    """
    unbroken = routing.mask_other_towers
    if mask_ignored:
        routing.mask_other_towers = lambda logits_S_B_E, *_: logits_S_B_E
    tokens = [0] * TOWERS.num_experts
    first = world.groups.ep.rank() * (TOWERS.num_experts // world.parallel.ep)

    def count(_experts: object, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        _, tokens_per_expert, _ = arguments
        for local, received in enumerate(tokens_per_expert.tolist()):
            tokens[first + local] += received

    try:
        engine = build(world, source)
        for module in engine.modules:
            for layer in module.modules():
                if isinstance(layer, ExpertLayer):
                    layer.experts.register_forward_pre_hook(count)
        batch = only_rows(batch_of(case, [0], multiple_of=world.parallel.length_multiple, balance=0.0), rows)
        engine.forward_backward([batch], lambda scores_2_B, _batch: LossOutput(scores_2_B[1].sum()))
    finally:
        routing.mask_other_towers = unbroken
    return Visits(tokens, {name: float(gradient.norm()) for name, gradient in full_gradients(engine).items()})


def full_gradients(engine: MegatronEngine) -> dict[str, Tensor]:
    """Gradients by name on every rank; they travel through the gather of the weights they belong to."""
    with torch.no_grad():
        for module in engine.modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.main_grad)
    return dict(engine.export_hf())


def only_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    index = torch.tensor(rows)
    assert batch.tower_ids_Q is not None
    return dataclasses.replace(
        batch,
        input_ids_B_S=batch.input_ids_B_S[index],
        host_ids_B_S=batch.host_ids_B_S[list(rows)],
        lengths=tuple(batch.lengths[row] for row in rows),
        slots=tuple(batch.slots[row] for row in rows),
        images_by_sequence=tuple(batch.images_by_sequence[row] for row in rows),
        tower_ids_Q=batch.tower_ids_Q[index],
        extras={name: values[index] for name, values in batch.extras.items()},
    )
