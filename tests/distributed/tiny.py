"""A tiny Qwen3-VL with weights that depend on their names only, and batches of unequal rows, for engine tests."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.conversion.checkpoints.folder import ModelFiles
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.engine.batch import Batch, beside_logits, collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput, places_of
from prism_megatron.engine.provider import LossOutput, ModelProvider
from prism_megatron.engine.runtime import World
from prism_megatron.types import ImageInput, TokenSequence

VOCAB, IMAGE, VIDEO, START, END, PAD = 97, 90, 91, 92, 93, 0

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "dtype": "float32",
    "text_config": {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": 1,
        "pad_token_id": PAD,
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 49,
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [0, 1],
    },
}

OPTIMIZER = OptimizerConfig(
    lr=1e-2, weight_decay=0.1, clip_grad=0.5, warmup_steps=2, schedule="cosine", min_lr_ratio=0.1
)


FILES = ModelFiles({"config.json": json.dumps(CONFIG).encode()})
"""What a checkpoint keeps of this model beside its tensors."""


def provider(*, tied: bool = True, freeze_vision: bool = False) -> Qwen3VLProvider:
    shape = Qwen3VLShape.from_dict({**CONFIG, "tie_word_embeddings": tied})
    return Qwen3VLProvider(shape, freeze=ALL_VISION if freeze_vision else ())


class NamedWeights(TensorSource):
    """A ``TensorSource`` of random tensors drawn from their own names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(self._shapes, torch.float32)

    def get(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(self._shapes[name], generator=generator)
        return 1.0 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.08 * noise


def weights(model: ModelProvider) -> NamedWeights:
    return NamedWeights(
        {
            name: shape
            for mapping in model.weight_mappings()
            for name, shape in zip(mapping.hf_names, mapping.hf_shapes or (), strict=True)
        }
    )


def build(
    world: World,
    *,
    name: str = "policy",
    dtype: torch.dtype = torch.float32,
    tied: bool = True,
    freeze_vision: bool = False,
    optimizer: OptimizerConfig | None = OPTIMIZER,
) -> MegatronEngine:
    model = provider(tied=tied, freeze_vision=freeze_vision)
    engine = MegatronEngine(name=name, provider=model, world=world, dtype=dtype, optimizer=optimizer, total_steps=20)
    engine.load_hf(weights(model))
    return engine


def rows(step: int) -> list[tuple[TokenSequence, list[float]]]:
    """Eight rows of 5 to 20 tokens with label masks; every other one shows an image, and some rows share one."""
    rng = np.random.default_rng(100 + step)
    pictures = [ImageInput(rng.normal(size=(16, 96)).astype(np.float32), (1, 4, 4)) for _ in range(2)]
    made: list[tuple[TokenSequence, list[float]]] = []
    for index in range(8):
        text = rng.integers(2, 88, size=int(rng.integers(5, 12))).tolist()
        if index % 2:
            made_row = TokenSequence((5, START, *[IMAGE] * 4, END, *text), (pictures[index // 4],))
        else:
            made_row = TokenSequence((5, *text))
        prompt = len(made_row.token_ids) - len(text)
        # Unequal counts of learned tokens: later rows learn fewer, so data-parallel ranks differ.
        learned = max(1, len(text) - index)
        made.append((made_row, [0.0] * prompt + [0.0] * (len(text) - learned) + [1.0] * learned))
    return made


def _shifted(values: Tensor) -> Tensor:
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


def cross_entropy(output: VocabularyOutput, batch: Batch, *, count: float) -> LossOutput:
    logprobs, _ = output.scores(_shifted(batch.input_ids_B_S), places_of(_shifted(batch.extras["mask"])))
    loss = -logprobs.sum() / count
    return LossOutput(loss=loss, sums={"loss": loss.detach()}, rows={"logprob": logprobs.detach().sum(1)})


def batches_of(world: World, step: int) -> tuple[list[Batch], partial[LossOutput]]:
    """This rank's micro-batches of two rows, and the loss with the step's global token count."""
    made, count = _microbatches(world, step, multiple_of=world.parallel.tp)
    return made, partial(cross_entropy, count=count)


def context_parallel_batches_of(world: World, step: int) -> tuple[list[Batch], partial[LossOutput]]:
    """As :func:`batches_of`, for sequences that are cut over context-parallel ranks."""
    made, count = _microbatches(world, step, multiple_of=world.parallel.length_multiple)
    return made, partial(_context_parallel_cross_entropy, world=world, count=count)


def _microbatches(world: World, step: int, *, multiple_of: int) -> tuple[list[Batch], float]:
    """This rank's, and the tokens that count of all ranks."""
    everything = rows(step)
    share = everything[world.dp_rank * 8 // world.dp_size : (world.dp_rank + 1) * 8 // world.dp_size]
    made = [
        collate(
            [row for row, _ in share[i : i + 2]],
            pad_token_id=PAD,
            multiple_of=multiple_of,
            device=world.device,
            token_extras={"mask": [mask for _, mask in share[i : i + 2]]},
        )
        for i in range(0, len(share), 2)
    ]
    return made, sum(sum(mask) for _, mask in everything)


def _context_parallel_cross_entropy(
    output: VocabularyOutput, batch: Batch, *, world: World, count: float
) -> LossOutput:
    targets, mask = (beside_logits(values, batch, world) for values in (batch.input_ids_B_S, batch.extras["mask"]))
    logprobs, _ = output.scores(targets, places_of(mask))
    loss = -logprobs.sum() / count
    return LossOutput(loss=loss, sums={"loss": loss.detach()})


def train(engine: MegatronEngine, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    history = []
    for step in steps:
        batches, loss = batches_of(engine.world, step)
        output = engine.forward_backward(batches, loss)
        history.append((output.sums["loss"], engine.step().grad_norm))
    return history


def exported(engine: MegatronEngine, bucket_bytes: int = 20_000) -> dict[str, Tensor]:
    """Every weight by its Hugging Face name; on rank 0 only, to spare the pipe."""
    tensors = dict(engine.export_hf(bucket_bytes))
    return tensors if engine.world.is_main else {}
