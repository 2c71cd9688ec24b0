"""What an engine needs to know of a model, and what a loss gives back. Models live in ``model_providers``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.engine.batch import Batch


class ModelProvider(Protocol):
    """Builds one model's pipeline chunks and names its weights."""

    def transformer_config(self, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Megatron's config of the language tower. Raises ConfigError for a layout that does not fit the model."""

    def build_chunk(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> MegatronModule:
        """One pipeline chunk. Its ``forward(batch)`` returns the payload for the next stage, or the output.

        The output is a ``logprobs.VocabularyOutput`` of this context-parallel rank's L tokens for a policy, and scores
        for a discriminator.
        """

    def expert_layout(self, source: TensorSource, /) -> ExpertLayout | None:
        """How ``source`` stores experts; None where all layouts have the same mappings, or none fits."""

    def weight_mappings(self, layout: ExpertLayout | None = None) -> Sequence[WeightMapping]:
        """Every Hugging Face tensor exactly once (see ``conversion/mapping.py``), in the model's own layout by default.

        Every layout names the same parameters. Raises ConversionError for a layout that the model is not stored in.
        """

    def measure(
        self, modules: Sequence[MegatronModule], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> Mapping[str, float]:
        """Metrics of the pass that a rank's chunks just ran, from what they counted, which is then forgotten.

        ``sum_over_ranks`` adds a tensor of the engine's device over all ranks, which call it together, and returns a
        tensor in host memory.
        """

    def is_frozen(self, parameter_name: str) -> bool:
        """Whether a parameter of a chunk (by its name in the chunk) stays as loaded."""


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What a loss returns for one micro-batch.

    ``loss`` is already divided by its global denominator, so micro-batches and data-parallel ranks simply add, and so
    do the gradients that context-parallel ranks find for their own tokens. ``sums`` are detached scalars that add over
    all of these, ``maxima`` detached scalars of which the largest counts; ``rows`` are detached per-row tensors
    ``[B, …]``.
    """

    loss: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


LossFn = Callable[[Any, Batch], LossOutput]
"""Takes what the model's last chunk returns."""


@dataclass(frozen=True, eq=False)
class PassOutput:
    """What a pass over micro-batches leaves on every rank of the model-parallel group.

    ``sums`` are added over micro-batches, context- and data-parallel ranks, and ``maxima`` taken over the same; beside
    the sums stand the metrics of ``ModelProvider.measure``, which are whole already;
    ``rows[i]`` belongs to micro-batch i of this data-parallel rank and stands on every pipeline stage.
    """

    sums: Mapping[str, float]
    maxima: Mapping[str, float]
    rows: Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did. ``updated`` is False where the gradient was not finite, or none was to be applied."""

    grad_norm: float
    lr: float
    updated: bool
