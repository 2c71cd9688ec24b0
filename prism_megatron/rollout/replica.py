"""A transformers Qwen3-VL, dense or with experts, whose weights are overwritten in place, under its own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration
from transformers.initialization import no_init_weights

from prism_megatron.conversion.hf.transformers_config import transformers_config
from prism_megatron.errors import WeightSyncError

_MODEL_CLASSES: Mapping[str, Any] = {
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
}
_TIED_NAME = "lm_head.weight"
_NUM_NAMES_SHOWN = 4


def build_replica(model_folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The model that ``model_folder/config.json`` describes, with *uninitialised* weights: nothing else is read.

    Raises ConfigError for another architecture, and ConversionError where transformers does not read it.
    """
    config = transformers_config(model_folder)
    config._attn_implementation = "sdpa"
    with no_init_weights():
        model = _MODEL_CLASSES[config.model_type]._from_config(config, dtype=dtype)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def copy_weights(
    model: Any, tensors: Iterable[tuple[str, Tensor]], *, left_out: AbstractSet[str] = frozenset()
) -> None:
    """Overwrite every weight of ``model`` but those ``left_out``, one tensor at a time, casting to its dtype.

    A tied ``lm_head.weight`` may be left out; where it is given it must equal the embedding.
    Raises WeightSyncError for an unknown, repeated, misshapen or missing tensor; ``model`` is then half written.
    """
    targets: dict[str, Tensor] = dict(model.state_dict())
    tied = bool(model.config.tie_word_embeddings)
    if tied:
        targets.pop(_TIED_NAME)
    tied_tensor: Tensor | None = None
    written: set[str] = set()
    for name, tensor in tensors:
        if tied and name == _TIED_NAME:
            tied_tensor = tensor
            continue
        if name not in targets:
            raise WeightSyncError(f"rollout model has no weight {name!r}; export the policy under Hugging Face names")
        if name in written:
            raise WeightSyncError(f"weight {name!r} was sent twice; each name may come once per update")
        if tensor.shape != targets[name].shape:
            raise WeightSyncError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the rollout model's is "
                f"{tuple(targets[name].shape)}; was a shard sent without being gathered?"
            )
        targets[name].copy_(tensor)
        written.add(name)
    missing = [name for name in targets if name not in written and name not in left_out]
    if missing:
        shown = ", ".join(missing[:_NUM_NAMES_SHOWN]) + (", …" if len(missing) > _NUM_NAMES_SHOWN else "")
        raise WeightSyncError(f"{len(missing)} of {len(targets)} weights of the rollout model were not sent: {shown}")
    if tied_tensor is not None:
        embedding = model.get_input_embeddings().weight
        if not torch.equal(tied_tensor.to(embedding), embedding):
            raise WeightSyncError(f"{_TIED_NAME} is tied to the embedding and was sent with other values")
