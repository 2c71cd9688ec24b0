"""Expert layers on Megatron: a router of ours, Megatron's all-to-all dispatch, one MLP after another as experts.

Shape suffixes: S tokens of this rank (a slice of the sequence under sequence parallelism), B rows, H hidden,
T = S · B tokens flattened, E experts, K chosen experts per token, Q sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor, nn

from prism_megatron.engine.layers.layer_parts import LayerParts
from prism_megatron.engine.layers.norms import parameter_device
from prism_megatron.engine.layers.specs import TORCH_PARTS
from prism_megatron.losses.load_balance import load_balance_loss, member_sums, sequence_sums


class ExpertRouter(MegatronModule):
    """The gate weight ``[E, H]`` of an expert layer; subclasses say in ``forward`` who goes where.

    ``forward(hidden_S_B_H, *routing_args)`` returns gates ``[T, E]`` and the chosen experts ``[T, E]`` (bool). What it
    needs of the batch comes as arguments, so that recomputing a layer, or running another micro-batch in between,
    cannot route by the wrong batch.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, *, is_mtp_layer: bool = False
    ) -> None:
        """``is_mtp_layer`` is what 0.19 passes to every router; we have no such layers."""
        del pg_collection, is_mtp_layer
        super().__init__(config=config)
        self.layer_number: int | None = None
        self.weight = nn.Parameter(
            torch.empty(
                config.num_moe_experts,
                config.hidden_size,
                dtype=config.params_dtype,
                device=parameter_device(config),
            )
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's layer gives its number here."""
        self.layer_number = layer_number


class ExpertLayer(MoELayer):
    """Megatron's MoE layer with routing inputs as arguments, and no loss, drop or shared expert of its own."""

    def __init__(self, config: TransformerConfig, parts: MoESubmodules, *, groups: ProcessGroupCollection) -> None:
        super().__init__(config, parts, pg_collection=groups)
        if config.expert_model_parallel_size > 1 or groups.expt_tp.size() != groups.tp.size():
            # Their gradients are summed over the ranks that hold the same experts, which are not the data-parallel
            # ones. 0.16 marks them for ep > 1 only; with a tensor-parallel size of their own, sums would be wrong.
            for parameter in self.experts.parameters():
                parameter.allreduce = False

    def forward(self, hidden_S_B_H: Tensor, *routing_args: Tensor) -> tuple[Tensor, None]:
        """``hidden [S, B, H]`` through the chosen experts, weighted by their gates; ``None`` stands for the bias."""
        try:
            return self._routed(hidden_S_B_H, *routing_args), None
        finally:
            # A layer that is recomputed does not end: torch breaks it off once backward has what it needs.
            self._forget()

    def _routed(self, hidden_S_B_H: Tensor, *routing_args: Tensor) -> Tensor:
        gates_T_E, chosen_T_E = self.router(hidden_S_B_H, *routing_args)
        if isinstance(self.token_dispatcher, MoEFlexTokenDispatcher):
            gates_T_E = gates_T_E.float()  # what DeepEP carries; Megatron would cast them too, with a warning each time
        tokens, gates = self.preprocess(hidden_S_B_H, gates_T_E, chosen_T_E)
        tokens, gates = self.dispatch(tokens, gates)
        output, _ = self.routed_experts_compute(tokens, gates)
        combined: Tensor = self.postprocess(self.combine(output), None)
        return combined

    def _forget(self) -> None:
        """Drop what Megatron's dispatcher keeps of a micro-batch and only its forward pass reads.

        Left there, differentiable tensors hold the whole graph until the next micro-batch, and after the last one
        for good: a cycle through the graph is one that Python cannot collect.
        """
        keepers = [self.token_dispatcher]
        if isinstance(self.token_dispatcher, MoEFlexTokenDispatcher):
            keepers.append(self.token_dispatcher._comm_manager)
        for keeper in keepers:
            for name, value in vars(keeper).items():
                if isinstance(value, Tensor) and value.requires_grad:
                    setattr(keeper, name, None)


class AttachLoss(torch.autograd.Function):
    """Returns ``values`` unchanged and gives ``loss`` a gradient of 1 when they are differentiated.

    The loss of the step must not be scaled afterwards: ours arrive divided by global denominators, and the
    optimizer's loss scale is 1 in fp32 and bf16. (Megatron's own attachment keeps its scale in a class variable, and
    its two supported versions multiply by different token counts.)
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_values, torch.ones_like(loss)


def balance_of_sequences(
    probs_T_E: Tensor,
    chosen_T_E: Tensor,
    sequence_T: Tensor,
    *,
    lengths_Q: Tensor,
    weights_Q: Tensor,
    top_k: int,
    experts_per_tower: int,
    group: dist.ProcessGroup,
    num_slots: int | None = None,
    members_2_P: Tensor | None = None,
) -> Tensor:
    """``losses.load_balance.load_balance_loss`` of whole sequences, of which each rank of ``group`` has some tokens.

    ``sequence_T`` numbers each token's slot. Where a sequence is more, or less, than one slot, there are ``num_slots``
    of them, and ``members_2_P`` has pairs (slot, sequence): a slot's tokens count in each of its sequences.
    Every rank ends with the same loss. Backward is the identity over ranks: a rank's gradient is that of its own
    tokens, and the router's weight gradient is summed over the group. Two all-reduces, whatever the data.
    """
    num = len(lengths_Q) if num_slots is None else num_slots
    counts_Q_E, prob_sums_Q_E = (
        sequence_sums(of, sequence_T, num=num) for of in (chosen_T_E.to(probs_T_E.dtype), probs_T_E)
    )
    if group.size() > 1:
        dist.all_reduce(counts_Q_E, group=group)
        prob_sums_Q_E = reduce_from_tensor_model_parallel_region(prob_sums_Q_E, group=group)
    if members_2_P is not None:
        counts_Q_E, prob_sums_Q_E = (
            member_sums(of, *members_2_P, num=len(lengths_Q)) for of in (counts_Q_E, prob_sums_Q_E)
        )
    return load_balance_loss(
        counts_Q_E, prob_sums_Q_E, lengths_Q, weights_Q, top_k=top_k, experts_per_tower=experts_per_tower
    )


def spread(values_K: Tensor, experts_K: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Values of K chosen experts as ``[…, E]`` with 0 elsewhere, and the choice as a bool map ``[…, E]``."""
    empty_E = values_K.new_zeros((*values_K.shape[:-1], num_experts))
    chosen_E = torch.zeros_like(empty_E, dtype=torch.bool).scatter(-1, experts_K, value=True)
    return empty_E.scatter(-1, experts_K, values_K), chosen_E


def fused_choice(logits_T_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates and chosen experts ``[T, E]`` by Transformer Engine's kernel: a softmax over the K largest logits.

    That is a full softmax, divided by what the chosen have of it. Logits of minus infinity are never chosen while K
    others are there. Which of two equal logits is chosen the kernel does not say.
    """
    from megatron.core.extensions.transformer_engine import fused_topk_with_score_function

    gates_T_E, chosen_T_E = fused_topk_with_score_function(
        logits=logits_T_E,
        topk=top_k,
        use_pre_softmax=False,
        num_groups=None,
        group_topk=None,
        scaling_factor=None,
        score_function="softmax",
        expert_bias=None,
    )
    return gates_T_E, chosen_T_E


def expert_layer(
    router: Callable[..., ExpertRouter], groups: ProcessGroupCollection, library: LayerParts = TORCH_PARTS
) -> type[ExpertLayer]:
    """An ``ExpertLayer`` as ``specs.decoder_layer_spec`` takes it for an MLP, bound to its router and groups.

    Its experts are those of ``library``.

    A class and not a ModuleSpec: 0.16 gives its groups only to specs of Megatron's own MoE classes and warns about
    every other spec; 0.19 calls whatever it gets.
    """
    parts = MoESubmodules(experts=library.experts, router=router)

    class BoundExpertLayer(ExpertLayer):
        def __init__(self, config: TransformerConfig, **_passed_by_0_19: Any) -> None:
            super().__init__(config, parts, groups=groups)

    return BoundExpertLayer
