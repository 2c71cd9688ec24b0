"""The oracle of a discriminator folder: transformers' Qwen3-VL with plain torch experts, in one process, unsplit.

Its parameter names are those of the folder, so its gradients compare by name.
Shape suffixes: B rows, S tokens of a row, H hidden, E experts of one tower, X of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLForConditionalGeneration
from transformers.initialization import no_init_weights

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.conversion.hf.transformers_config import transformers_config
from prism_megatron.parity.compare import Outcome
from prism_megatron.parity.oracle import model_inputs, train_padding
from prism_megatron.parity.probe import Sample, random_weights


class PlainExpert(nn.Module):
    """One gated MLP."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``down(silu(gate(x)) · up(x))``."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class PlainTowers(nn.Module):
    """Token by token: softmax over the tower's experts, the best k, renormalised."""

    def __init__(self, hidden: int, ffn: int, towers: Towers) -> None:
        super().__init__()
        self.towers = towers
        self.gate = nn.Linear(hidden, towers.num_experts, bias=False)
        self.experts = nn.ModuleList(PlainExpert(hidden, ffn) for _ in range(towers.num_experts))
        self.tower_ids: Sequence[int] = ()
        """the tower that judges each row; set before every pass"""

    def forward(self, x_B_S_H: Tensor) -> Tensor:
        """The layer's output, row by row."""
        logits_B_S_X = self.gate(x_B_S_H)
        rows = []
        for b, tower in enumerate(self.tower_ids):
            own = list(range(tower % self.towers.num_towers, self.towers.num_experts, self.towers.num_towers))
            probs_S_E = logits_B_S_X[b][:, own].float().softmax(-1)
            top = probs_S_E.topk(self.towers.top_k, dim=-1)
            gates_S_E = torch.zeros_like(probs_S_E).scatter(-1, top.indices, top.values)
            gates_S_E = (gates_S_E / gates_S_E.sum(-1, keepdim=True)).to(x_B_S_H.dtype)
            rows.append(sum(gates_S_E[:, i, None] * self.experts[e](x_B_S_H[b]) for i, e in enumerate(own)))
        return torch.stack(rows)


def add_towers(model: Any, shape: Qwen3VLShape, towers: Towers | None) -> Any:
    """``model``, a transformers Qwen3-VL, with towers, if any, for its MLPs and a score for its vocabulary."""
    text = shape.text
    if towers is not None:
        for layer in model.model.language_model.layers:
            layer.mlp = PlainTowers(text.hidden, text.ffn, towers)
    model.score = nn.Linear(text.hidden, 1, bias=False)
    del model.lm_head
    return model


def load_plain_discriminator(
    folder: Path, shape: Qwen3VLShape, towers: Towers | None, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """The folder's model in evaluation mode; read in float32 and its parameters cast (see ``load_transformers``)."""
    config = transformers_config(folder)
    kind: Any = Qwen3VLForConditionalGeneration
    with no_init_weights():
        model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    source = open_weights(folder)
    add_towers(model, shape, towers).load_state_dict({name: source.get(name).float() for name in source.names()})
    train_padding(model)
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def num_judges(towers: Towers | None) -> int:
    """How many scores a sample gets: one of each tower, one from a pool or from dense MLPs."""
    return 1 if towers is None else towers.num_towers


def score_weight(sample: Sample, tower: int, towers: int) -> float:
    """What the probe loss multiplies a score by: a fixed random number of the sample's and of its tower among them."""
    return float(random_weights(sample.key, 1, towers)[0, tower])


def plain_outcome(model: Any, samples: Sequence[Sample], shape: Qwen3VLShape, towers: Towers | None) -> Outcome:
    """Scores ``[1, towers]`` of each sample, which every tower judges by itself, and gradients of their probe loss."""
    model.zero_grad(set_to_none=True)
    scores = []
    layers = [module for module in model.modules() if isinstance(module, PlainTowers)]
    for sample in samples:
        inputs = model_inputs(sample, shape, model.device)
        of_sample = []
        for tower in range(num_judges(towers)):
            for mlp in layers:
                mlp.tower_ids = [tower]
            last_H = model.model(**inputs, use_cache=False).last_hidden_state[0, -1]
            score = last_H.float() @ model.score.weight[0].float()
            (score * score_weight(sample, tower, num_judges(towers))).backward()
            of_sample.append(score.detach().cpu())
        scores.append(torch.stack(of_sample)[None])
    gradients = {
        name: torch.zeros_like(parameter, dtype=torch.float32, device="cpu")
        if parameter.grad is None
        else parameter.grad.float().cpu()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return Outcome(scores, gradients)
