"""The mini's policy with experts in place of its MLPs, as a Hugging Face folder: it answers much as the mini does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.conversion.expert_layout import ExpertLayout

NUM_EXPERTS = 8
SOURCE = MINI_FOLDER / "policy"
_PARTS = ("gate", "up", "down")
_NOISE, _ROUTER_STD = 0.01, 0.2


def write_mini_with_experts(folder: Path, layout: ExpertLayout = "hub", *, experts: int = NUM_EXPERTS) -> Path:
    """Experts are copies of the layer's MLP with noise, two for each token; routers are random, and so is a third tap.

    SGLang's Qwen3-VL-MoE takes three DeepStack taps, whatever the config says; the mini has two.
    """
    folder.mkdir()
    for path in SOURCE.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(_config(experts)))
    save_file(_tensors(layout, experts), folder / "model.safetensors")
    return folder


def _config(experts: int) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((SOURCE / "config.json").read_text())
    config |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    config["vision_config"] |= {"model_type": "qwen3_vl_moe", "deepstack_visual_indexes": [0, 1, 2]}
    config["text_config"] |= {
        "model_type": "qwen3_vl_moe_text",
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": config["text_config"]["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return config


def _tensors(layout: ExpertLayout, experts: int) -> dict[str, Tensor]:
    """float32, and the same numbers whatever the layout."""
    generator = torch.Generator().manual_seed(0)
    held = {name: tensor.float() for name, tensor in load_file(SOURCE / "model.safetensors").items()}
    last = "model.visual.deepstack_merger_list.1."
    for name in [name for name in held if name.startswith(last)]:
        noise = torch.randn(held[name].shape, generator=generator)
        held[name.replace(last, "model.visual.deepstack_merger_list.2.")] = held[name] * (1.0 + 0.1 * noise)
    layer = 0
    while (stem := f"model.language_model.layers.{layer}.mlp") + ".gate_proj.weight" in held:
        dense = [held.pop(f"{stem}.{part}_proj.weight") for part in _PARTS]
        held[f"{stem}.gate.weight"] = _ROUTER_STD * torch.randn(experts, dense[0].shape[1], generator=generator)
        gate, up, down = (one + _NOISE * torch.randn((experts, *one.shape), generator=generator) for one in dense)
        if layout == "per_expert":
            for part, of in zip(_PARTS, (gate, up, down), strict=True):
                for expert in range(experts):
                    held[f"{stem}.experts.{expert}.{part}_proj.weight"] = of[expert].clone()
        else:
            fused = {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}
            for name, tensor in fused.items():
                stored = tensor if layout == "transformers" else tensor.transpose(1, 2)
                held[f"{stem}.experts.{name}"] = stored.contiguous()
        layer += 1
    return held
