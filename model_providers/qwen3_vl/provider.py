"""Builds the pipeline chunks of a Qwen3-VL policy and names its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from torch.nn.functional import silu

from model_providers.qwen3_vl.mapping import weight_mappings
from model_providers.qwen3_vl.model import Qwen3VLModel
from model_providers.qwen3_vl.router import SoftmaxRouter, expert_figures
from prism_megatron.config.architecture.model import FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import NO_ROUTER_LOSSES, ExpertSizes, RouterLosses
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import check_precision
from prism_megatron.conversion.expert_layout import ExpertLayout, detect_expert_layout
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.engine.host.execution import PLAIN, Execution
from prism_megatron.engine.layers.experts import expert_layer
from prism_megatron.engine.layers.mlp import dense_mlp
from prism_megatron.engine.layers.specs import decoder_layer_spec, layer_parts
from prism_megatron.errors import ConfigError


class Qwen3VLProvider:
    """A Qwen3-VL policy, dense or with experts (see ``engine.provider.ModelProvider``)."""

    def __init__(
        self,
        shape: Qwen3VLShape,
        *,
        freeze: Collection[FreezeGroup] = (),
        router_losses: RouterLosses = NO_ROUTER_LOSSES,
        execution: Execution = PLAIN,
    ) -> None:
        """``freeze`` names the parts that stay as loaded."""
        self.router_losses = router_losses
        self.shape = shape
        self.freeze = frozenset(freeze)
        self.execution = execution

    def transformer_config(self, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Megatron's config of the language tower. Raises ConfigError for a layout that does not fit the model."""
        return text_config(
            self.shape,
            parallel,
            dtype,
            experts=self.shape.text.experts,
            execution=self.execution,
        )

    def build_chunk(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> Qwen3VLModel:
        """One pipeline chunk; weights are left uninitialised, for loading."""
        parts = layer_parts(self.execution.layers)
        dense = self.shape.text.experts is None
        mlp = (
            dense_mlp(groups, parts)
            if dense
            else expert_layer(functools.partial(SoftmaxRouter, losses=self.router_losses), groups, parts)
        )
        return Qwen3VLModel(
            config,
            self.shape,
            decoder_layer_spec(mlp, self.execution.recompute, parts),
            groups,
            recompute_vision=self.execution.recompute.recompute_vision,
            fp32_head=self.execution.precision.fp32_head,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )

    def expert_layout(self, source: TensorSource, /) -> ExpertLayout | None:
        """How ``source`` stores experts (see ``conversion.expert_layout``)."""
        return detect_expert_layout(source, self.shape)

    def weight_mappings(self, layout: ExpertLayout | None = None) -> Sequence[WeightMapping]:
        """Every Hugging Face tensor exactly once; experts as transformers 5 has them unless ``layout`` is given."""
        return weight_mappings(self.shape) if layout is None else weight_mappings(self.shape, layout)

    def measure(
        self, modules: Sequence[MegatronModule], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> Mapping[str, float]:
        """Which experts the tokens of the pass chose, and what routers lost (see ``router.expert_figures``)."""
        text = self.shape.text
        if text.experts is None:
            return {}
        return expert_figures(modules, text.experts, text.num_layers, sum_over_ranks)

    def is_frozen(self, parameter_name: str) -> bool:
        """Whether a parameter of a chunk stays as loaded."""
        return part_of(parameter_name) in self.freeze


def part_of(parameter_name: str) -> FreezeGroup | None:
    """The part of the model, by which it may be frozen, that a parameter of a chunk belongs to; None for the rest."""
    if parameter_name.startswith(("vision_model.merger.", "vision_model.deepstack_mergers.")):
        return "projector"
    if parameter_name.startswith("vision_model."):
        return "vision"
    return "router" if ".router." in parameter_name else None


def text_config(
    shape: Qwen3VLShape,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    experts: ExpertSizes | None,
    execution: Execution = PLAIN,
) -> TransformerConfig:
    """Megatron's config of a Qwen3-VL language tower, whose MLPs may be ``experts``.

    Raises ConfigError for a layout or FP8 settings that do not fit the model.
    """
    precision = execution.precision
    shape.check_layout(parallel)
    # Whether rows are packed is known where a run is started, and checked there.
    check_precision(precision, parallel, shape, dtype=str(dtype).removeprefix("torch."), packs=False)
    if precision.fp8 != "none" and execution.layers != "te":
        raise ConfigError(
            f"--fp8 {precision.fp8} needs layers of Transformer Engine, and megatron-core would ignore it without; "
            "use --fp8 none here"
        )
    text = shape.text
    settings: dict[str, Any] = {
        "num_layers": text.num_layers,
        "hidden_size": text.hidden,
        "ffn_hidden_size": text.ffn,
        "num_attention_heads": text.heads,
        "num_query_groups": text.kv_heads,
        "kv_channels": text.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": text.eps,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "context_parallel_size": parallel.cp,
        "cp_comm_type": parallel.cp_comm,
        "sequence_parallel": parallel.sequence_parallel(experts=experts is not None),
        # Payloads grow and shrink with the DeepStack taps they carry.
        "variable_seq_lengths": parallel.pp > 1,
        # Interleaved schedules: batched sends mix up activations and gradients at pp 2 · vpp 2, silently.
        "overlap_p2p_comm": parallel.vpp > 1,
        "batch_p2p_comm": parallel.vpp == 1,
        "deallocate_pipeline_outputs": True,
        # Losses arrive divided by their global denominators.
        "calculate_per_token_loss": True,
        "perform_initialization": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "deterministic_mode": parallel.deterministic,
    }
    if experts is not None:
        experts.check_layout(parallel)
        settings |= {
            "num_moe_experts": experts.count,
            "moe_router_topk": experts.per_token,
            "moe_ffn_hidden_size": experts.width,
            "expert_model_parallel_size": parallel.ep,
            "expert_tensor_parallel_size": parallel.expert_tp,
            # Routers are ours (see engine.experts); what they lose to balance load they attach themselves.
            "moe_router_load_balancing_type": "none",
            # Megatron refuses a top-1 router that softmaxes over its one choice; its own router is not used.
            "moe_router_pre_softmax": experts.per_token == 1,
        }
    settings |= execution.fast.settings(experts=experts is not None)
    return TransformerConfig(**(settings | precision.transformer_settings()))
