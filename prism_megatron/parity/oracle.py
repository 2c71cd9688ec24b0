"""What transformers makes of samples: one forward and backward pass per sample, unpadded and unsplit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration
from transformers.utils import logging

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.hf.transformers_config import transformers_config, transformers_reads
from prism_megatron.data.model_inputs import transformers_inputs
from prism_megatron.parity.compare import Outcome
from prism_megatron.parity.probe import Sample, probe_weights


def load_transformers(folder: Path, shape: Qwen3VLShape, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder's model in evaluation mode.

    Read in float32 and its parameters cast: rounding the whole model would round the rotary frequencies with it.
    Raises ConfigError and ConversionError where transformers does not read the folder.
    """
    logging.disable_progress_bar()
    config = transformers_config(folder)
    with transformers_reads(folder):
        model = _kind(shape).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    train_padding(model)
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def one_layer_transformers(folder: Path, shape: Qwen3VLShape) -> Any:
    """The folder's model cut to one language layer, in evaluation mode, without weights: they are on ``meta``."""
    config = transformers_config(folder)
    config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        model = _kind(shape)._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    # What is computed and not loaded has to exist.
    text = model.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config=config.text_config)
    visual = model.model.visual
    model.model.visual = type(visual)._from_config(visual.config, attn_implementation="sdpa", dtype=torch.float32)
    train_padding(model)
    return model.eval()


def train_padding(model: Any) -> None:
    """Give the row of the pad token its gradient, which torch's embedding withholds.

    Where a config names a token that occurs in texts, such as the end of a turn, as padding, ours trains it as any
    other. Its logits are the same either way.
    """
    model.get_input_embeddings().padding_idx = None


def _kind(shape: Qwen3VLShape) -> Any:
    return Qwen3VLMoeForConditionalGeneration if shape.text.num_experts else Qwen3VLForConditionalGeneration


def model_inputs(sample: Sample, shape: Qwen3VLShape, device: torch.device) -> dict[str, Tensor]:
    """A sample as keyword arguments of transformers' ``forward``."""
    return transformers_inputs(sample.row, shape, device)


def transformers_outcome(model: Any, samples: Sequence[Sample], shape: Qwen3VLShape) -> Outcome:
    """Run every sample by itself. The model keeps no gradients afterwards."""
    model.zero_grad(set_to_none=True)
    logits = []
    for sample in samples:
        logits_T_V = model(**model_inputs(sample, shape, model.device), use_cache=False).logits[0].float()
        (logits_T_V * probe_weights(sample, shape.text.vocab).to(model.device)).sum().backward()
        logits.append(logits_T_V.detach().cpu())
    gradients = {
        name: torch.zeros_like(parameter, dtype=torch.float32, device="cpu")
        if parameter.grad is None
        else parameter.grad.float().cpu()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return Outcome(logits, gradients)
