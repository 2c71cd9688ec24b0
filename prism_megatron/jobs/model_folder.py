"""The one door to a model folder: every tool asks here whether it is a model, and says the same of one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model_providers.moe_discriminator.folder import is_discriminator, read_variant
from model_providers.moe_discriminator.mapping import expert_layout as discriminator_layout
from model_providers.moe_discriminator.mapping import weight_mappings as discriminator_mappings
from model_providers.moe_discriminator.variant import Variant
from model_providers.qwen3_vl.mapping import weight_mappings as policy_mappings
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.expert_layout import ExpertLayout, detect_expert_layout
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.conversion.hf.transformers_config import transformers_config
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.verify import check_names
from prism_megatron.data.reading.model_files import check_model_files
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose config and weights fit each other. ``variant`` is a discriminator's kind, None for a policy."""

    source: TensorSource
    shape: Qwen3VLShape
    mappings: Sequence[WeightMapping]
    expert_layout: ExpertLayout | None
    variant: Variant | None


def open_model_folder(folder: Path) -> ModelFolder:
    """What ``folder`` holds, from its config and the headers of its weights (a tied repeat is read).

    Raises ConfigError for a config that is none of ours, ConversionError for one that transformers does not read and
    for weights that are not those that it says.
    """
    shape, source = Qwen3VLShape.from_folder(folder), open_weights(folder)
    transformers_config(folder)  # servers, tokenizers and the embedded engine read the folder by it
    variant = read_variant(folder) if is_discriminator(folder) else None
    layout = detect_expert_layout(source, shape) if variant is None else discriminator_layout(variant.towers)
    mappings = mappings_of(folder, layout)
    check_names(mappings, source, where=folder)
    return ModelFolder(source, shape, mappings, layout, variant)


def check_model_folder(folder: Path) -> None:
    """Raise PrismError unless ``folder`` is a model that can train: ``open_model_folder``, and DataError for files
    that make no inputs for it."""
    check_model_files(folder, open_model_folder(folder).shape)


def mappings_of(companions: Path, layout: ExpertLayout | None) -> Sequence[WeightMapping]:
    """The mappings of the model whose files stand in ``companions``, its experts stored as ``layout``.

    Raises ConfigError.
    """
    shape = Qwen3VLShape.from_folder(companions)
    if is_discriminator(companions):
        towers = read_variant(companions).towers
        if layout not in (None, discriminator_layout(towers)):
            raise ConfigError(
                f"--expert-layout {layout}: a discriminator stores its experts as {discriminator_layout(towers)}"
            )
        return discriminator_mappings(shape, towers)
    return policy_mappings(shape) if layout is None else policy_mappings(shape, layout)
