"""What each rank does in the discriminator's parity tests, through ``MegatronEngine``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from model_providers.moe_discriminator import routing
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.stages.discriminator import LoadBalanceScope
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.layers.attention import Sequences, gather_tokens
from prism_megatron.engine.layers.experts import ExpertLayer
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.losses.discriminator import discriminator_loss
from tests.parity.discriminator_oracle import (
    BALANCE,
    DROPOUT,
    REGULARISER,
    TOWERS,
    Case,
    Z,
    batch_of,
    pair_rows,
    tiny_shape,
)

KEEP_ALL = RecomputeConfig()


@dataclass(frozen=True)
class Options:
    """How a step is run, once for each value of ``packs``."""

    towers: Towers | None = TOWERS
    balance: float = BALANCE
    scope: LoadBalanceScope = "sequence"
    z: float = Z
    packs: tuple[bool, ...] = (False, True)
    recompute: RecomputeConfig = KEEP_ALL
    freeze_vision: bool = False


@dataclass(frozen=True)
class RankStep:
    """One step of a rank: scores of its prompts, the global pair loss, gradient norm, full gradients by name.

    ``attached`` are this rank's load-balancing and z-losses, summed over its layers and micro-batches.
    """

    scores: dict[int, Tensor]
    loss: float
    attached: tuple[float, float]
    loads: dict[str, float]
    grad_norm: float
    gradients: dict[str, Tensor]


def build(world: World, source: TensorSource, options: Options) -> MegatronEngine:
    engine = MegatronEngine(
        name="discriminator",
        provider=DiscriminatorProvider(
            tiny_shape(),
            options.towers,
            head_dropout=DROPOUT,
            load_balance_scope=options.scope,
            router_z_loss=options.z,
            freeze_vision=options.freeze_vision,
            execution=Execution(options.recompute),
        ),
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


@contextmanager
def attached_losses() -> Iterator[tuple[list[float], list[float]]]:
    """Collects the values of every layer's load-balancing and z-losses."""
    found: tuple[list[float], list[float]] = ([], [])
    names = ("balance_of_sequences", "router_z_loss")
    originals = [getattr(routing, name) for name in names]

    def recorded(function: Callable[..., Tensor], values: list[float]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **keywords: Any) -> Tensor:
            loss = function(*arguments, **keywords)
            values.append(float(loss))
            return loss

        return call

    for name, original, values in zip(names, originals, found, strict=True):
        setattr(routing, name, recorded(original, values))
    try:
        yield found
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(routing, name, original)


def train_step(world: World, source: TensorSource, case: Case, options: Options) -> list[RankStep]:
    """Forward and backward over all prompts, for each of ``options.packs``; no weight changes."""
    engine = build(world, source, options)

    def loss(scores_2_B: Tensor, batch: Batch) -> LossOutput:
        result = discriminator_loss(
            scores_2_B[1], pair_rows(batch), pair_counts=case.pair_counts, regulariser_coefficient=REGULARISER
        )
        return LossOutput(
            result.loss, {"loss": result.loss.detach() / world.parallel.cp}, {"scores": scores_2_B[0].detach()}
        )

    steps = []
    for pack in options.packs:
        batches = my_batches(world, case, balance=options.balance, pack=pack)
        with attached_losses() as attached:
            output = engine.forward_backward(list(batches.values()), loss)
        gradients = {name: gradient.clone() for name, gradient in engine.export_gradients()}
        steps.append(
            RankStep(
                scores={p: rows["scores"] for p, rows in zip(batches, output.rows, strict=True)},
                loss=output.sums["loss"],
                attached=(sum(attached[0]), sum(attached[1])),
                loads={name: value for name, value in output.sums.items() if "/expert_" in name},
                grad_norm=engine.step().grad_norm,
                gradients=gradients,
            )
        )
    return steps


def last_hidden_states(
    world: World, sources: Sequence[tuple[Towers, TensorSource]], case: Case
) -> list[dict[int, Tensor]]:
    """Per source: hidden states ``[B, S, H]`` after the final norm by prompt, on the ranks of the last stage."""
    return [_last_hidden_states(world, source, case, towers) for towers, source in sources]


def _last_hidden_states(world: World, source: TensorSource, case: Case, towers: Towers) -> dict[int, Tensor]:
    engine = build(world, source, Options(towers))
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


def visits(
    world: World, source: TensorSource, case: Case, judged: Sequence[Sequence[int]], mask_ignored: bool
) -> list[Visits]:
    """For each list of towers run prompt 0's sequences of those, packed; count what dispatchers hand to each expert.

    ``mask_ignored`` breaks the routing on purpose: every token then sees all experts.
    """
    unbroken = routing.mask_other_towers
    if mask_ignored:
        routing.mask_other_towers = lambda logits_T_E, *_: logits_T_E
    first = world.groups.ep.rank() * (TOWERS.num_experts // world.parallel.ep)
    engine, found = build(world, source, Options()), []
    tokens = [0] * TOWERS.num_experts

    def count(_experts: object, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        _, tokens_per_expert, _ = arguments
        for local, received in enumerate(tokens_per_expert.tolist()):
            tokens[first + local] += received

    try:
        for module in engine.modules:
            for layer in module.modules():
                if isinstance(layer, ExpertLayer):
                    layer.experts.register_forward_pre_hook(count)
        for towers in judged:
            tokens[:] = [0] * TOWERS.num_experts
            batch = batch_of(of_towers(case, towers), [0], multiple_of=world.parallel.length_multiple, pack=True)
            engine.forward_backward([batch], lambda scores_2_B, _batch: LossOutput(scores_2_B[1].sum()))
            norms = {name: float(gradient.norm()) for name, gradient in engine.export_gradients()}
            found.append(Visits(list(tokens), norms))
    finally:
        routing.mask_other_towers = unbroken
    return found


def of_towers(case: Case, towers: Sequence[int]) -> Case:
    """Prompt 0 with the sequences of some towers only, references included."""
    kept = [i for i, tower in enumerate(case.tower_ids[0]) if tower in towers]
    return Case(
        [[case.prompts[0][i] for i in kept]],
        [[case.tower_ids[0][i] for i in kept]],
        [[kept.index(case.reference_rows[0][i]) for i in kept]],
        [[case.keys[0][i] for i in kept]],
    )
