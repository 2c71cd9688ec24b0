"""What a rank does in the tests of checkpoints: four kinds of tiny models, one training step, saves and loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model_providers.moe_discriminator.folder import config_text
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.moe_discriminator.variant import Variant
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.conversion.checkpoints.folder import ModelFiles
from prism_megatron.engine import checkpoint
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.provider import LossOutput, ModelProvider
from prism_megatron.engine.runtime import World
from prism_megatron.jobs.convert import Role
from tests.distributed import tiny

Kind = Literal["dense", "experts", "discriminator", "dense discriminator"]
FOLDERS: Mapping[str, Mapping[Role, Kind]] = {
    "players": {"policy": "dense", "discriminator": "discriminator"},
    "experts": {"policy": "experts"},
    "without towers": {"discriminator": "dense discriminator"},
}
"""The checkpoints of the tests, and what kind of model each of their roles is."""

EXPERTS_CONFIG: dict[str, Any] = {
    **tiny.CONFIG,
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "text_config": {
        **tiny.CONFIG["text_config"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}
TOWERS = Towers(experts_per_tower=4, top_k=2)
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
"""``eps`` is so large that an update is nearly proportional to its gradient: rounding does not become full steps."""


def provider(kind: Kind) -> ModelProvider:
    if kind == "dense":
        return tiny.provider()
    if kind == "experts":
        return Qwen3VLProvider(Qwen3VLShape.from_dict(EXPERTS_CONFIG))
    towers = TOWERS if kind == "discriminator" else None
    return DiscriminatorProvider(tiny.provider().shape, towers, head_dropout=0.0)


def files(roles: Mapping[Role, Kind]) -> dict[str, ModelFiles]:
    """What a checkpoint keeps of each role beside its tensors."""
    config = json.dumps(tiny.CONFIG)
    texts = {
        "dense": config,
        "experts": json.dumps(EXPERTS_CONFIG),
        "discriminator": config_text(config, Variant(TOWERS)),
        "dense discriminator": config_text(config, Variant(None)),
    }
    return {role: ModelFiles({"config.json": texts[kind].encode()}) for role, kind in roles.items()}


def build(
    world: World,
    kind: Kind,
    model: ModelProvider | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> MegatronEngine:
    model = model or provider(kind)
    optimizer = replace(OPTIMIZER, offload=offload)
    role = "discriminator" if kind in {"discriminator", "dense discriminator"} else "policy"
    engine = MegatronEngine(name=role, provider=model, world=world, dtype=dtype, optimizer=optimizer, total_steps=9)
    engine.load_hf(tiny.weights(model))
    return engine


def step(engine: MegatronEngine, number: int) -> tuple[float, float]:
    """Loss and gradient norm of training step ``number``."""
    if engine.name == "policy":
        return tiny.train(engine, range(number, number + 1))[0]
    world = engine.world
    mine = range(world.dp_rank, 8, world.dp_size)
    everything = tiny.rows(number)
    batch = collate(
        [everything[index][0] for index in mine],
        pad_token_id=tiny.PAD,
        multiple_of=world.parallel.tp,
        device=world.device,
        tower_ids=[index % 2 for index in mine],
    )

    def loss(scores_2_B: Tensor, _batch: Batch) -> LossOutput:
        total = ((scores_2_B[1] - 1.0) ** 2).sum() / 8
        return LossOutput(total, {"loss": total.detach()})

    output = engine.forward_backward([batch], loss)
    return output.sums["loss"], engine.step().grad_norm


@dataclass(frozen=True, eq=False)
class Continuation:
    """The step after a save or load: loss, gradient norm, and (on rank 0) the weights after it."""

    loss: float
    grad_norm: float
    weights: Mapping[str, Tensor]


def _continue(engines: Mapping[str, MegatronEngine]) -> dict[str, Continuation]:
    found = {}
    for role, engine in engines.items():
        loss, norm = step(engine, 2)
        found[role] = Continuation(loss, norm, tiny.exported(engine))
    return found


def train_and_save(world: World, root: Path) -> dict[str, dict[str, Continuation]]:
    """Two steps of every kind, a save, and how each goes on."""
    found = {}
    for name, roles in FOLDERS.items():
        engines: dict[str, MegatronEngine] = {role: build(world, kind) for role, kind in roles.items()}
        for engine in engines.values():
            step(engine, 0)
            step(engine, 1)
        checkpoint.save(root / name, engines, {"step": 2}, models=files(roles))
        found[name] = _continue(engines)
    return found


def load_and_continue(world: World, root: Path, again: Path) -> dict[str, dict[str, Continuation]]:
    """Load every folder of ``root``, save it to ``again`` as it was loaded, and take the next step."""
    found = {}
    for name, roles in FOLDERS.items():
        engines: dict[str, MegatronEngine] = {role: build(world, kind) for role, kind in roles.items()}
        state = checkpoint.load(root / name, engines)
        assert state == {"step": 2}
        checkpoint.save(again / name, engines, state, models=files(roles))
        found[name] = _continue(engines)
    return found


def weights_of(world: World, folder: Path, kind: Kind, model: ModelProvider | None = None) -> dict[str, Tensor]:
    """The weights that a bf16 engine takes from a checkpoint; asserts that masters follow and that no step is taken."""
    engine = build(world, kind, model, dtype=torch.bfloat16)
    checkpoint.load_weights(folder, engine, engine.name)
    assert engine.progress() == {"steps_taken": 0, "adam_step": 0}
    assert engine.optimizer is not None
    before = tiny.exported(engine)
    engine.optimizer.step()  # copies masters to weights; without gradients, decay is all that changes them
    drift = [float((after - before[name]).abs().max()) for name, after in tiny.exported(engine).items()]
    assert not drift or max(drift) < 0.01, max(drift)
    return before
