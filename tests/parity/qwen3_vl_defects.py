"""Known defects, put back on every rank for one measurement; and what a rank counts for the other tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from model_providers.qwen3_vl import balance, deepstack, model, provider
from model_providers.qwen3_vl.deepstack import VisualRows
from model_providers.qwen3_vl.vision import VisionBlock, VisionMLP
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.config.recompute import RecomputeConfig
from prism_megatron.engine.attention import Sequences
from prism_megatron.engine.runtime import World
from prism_megatron.engine.specs import DecoderLayer
from prism_megatron.parity import ranks
from prism_megatron.parity.compare import Outcome
from prism_megatron.parity.matrix import Block, Cell, measure
from prism_megatron.parity.probe import Sample
from prism_megatron.parity.ranks import build_engine, run_samples
from prism_megatron.parity.samples import sample_sets


def measure_broken(world: World, folder: Path, block: Block, defect: str) -> list[Cell]:
    """``measure`` with one defect put back, by its name in ``put_back``."""
    with pytest.MonkeyPatch.context() as patch:
        put_back(defect, patch)
        return measure(world, folder, block)


def outcome_of(
    world: World, folder: Path, samples: Sequence[Sample], defect: str = "", num_microbatches: int = 1
) -> Outcome | None:
    """The padded samples' outcome, with a defect put back or none."""
    shape = Qwen3VLShape.from_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "num_microbatches", lambda _parallel: num_microbatches)
        if defect:
            put_back(defect, patch)
        return run_samples(build_engine(world, folder, shape, dtype=torch.float32), shape, samples, pack=False).outcome


def put_back(defect: str, patch: pytest.MonkeyPatch) -> None:
    """Bring the named defect about."""
    if defect == "no DeepStack":
        patch.setattr(VisualRows, "add", lambda _self, hidden, _rows: hidden)
    elif defect == "plain RoPE":
        patch.setattr(deepstack, "row_positions", lambda visual, _frames: np.tile(np.arange(len(visual)), (3, 1)))
    elif defect == "tanh GELU in mergers":
        patch.setattr(VisionMLP, "__init__", _with_tanh(VisionMLP.__init__))
    elif defect == "taps sliced under SP":
        patch.setattr(model, "copy_to_tensor_model_parallel_region", lambda tap, **_group: tap)
    elif defect == "packed samples see each other":
        patch.setattr(Sequences, "runs", _one_run)
    elif defect == "image gradients kept by their rank under CP":
        patch.setattr(
            balance,
            "gather_from_sequence_parallel_region",
            functools.partial(gather_from_sequence_parallel_region, tensor_parallel_output_grad=False),
        )
    elif defect == "batched p2p under VPP":
        patch.setattr(provider, "TransformerConfig", _batched_p2p)
    else:
        raise ValueError(defect)


def _one_run(sequences: Sequences) -> Iterator[tuple[int, int]]:
    yield sum(sequences.slots), 1


def _with_tanh(original: Callable[..., None]) -> Callable[..., None]:
    def build(self: VisionMLP, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **(keywords | {"gelu": "tanh"}))

    return build


def _batched_p2p(**settings: Any) -> TransformerConfig:
    return TransformerConfig(**(settings | {"overlap_p2p_comm": False, "batch_p2p_comm": True}))


def payload_rows(world: World, folder: Path, samples: Sequence[Sample]) -> int:
    """Rows of what this stage's chunk returned for its last micro-batch."""
    shape, lengths = Qwen3VLShape.from_folder(folder), []
    engine = build_engine(world, folder, shape, dtype=torch.float32)
    engine.modules[0].register_forward_hook(lambda _module, _inputs, output: lengths.append(len(output)))
    run_samples(engine, shape, samples, pack=True)
    return lengths[-1]


def forward_counts(world: World, folder: Path, recompute: RecomputeConfig) -> tuple[int, int]:
    """How often a decoder layer and a vision block ran in one step."""
    counts = {DecoderLayer: 0, VisionBlock: 0}
    shape = Qwen3VLShape.from_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        for kind, method in ((DecoderLayer, "_layer"), (VisionBlock, "forward")):
            patch.setattr(kind, method, _counted(getattr(kind, method), counts, kind))
        engine = build_engine(world, folder, shape, dtype=torch.float32, recompute=recompute)
        run_samples(engine, shape, sample_sets()["one image"], pack=False)
    return counts[DecoderLayer], counts[VisionBlock]


def _counted(original: Callable[..., Any], counts: dict[Any, int], kind: Any) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        counts[kind] += 1
        return original(*arguments, **keywords)

    return run
