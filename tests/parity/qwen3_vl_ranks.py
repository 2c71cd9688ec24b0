"""What each rank does and counts in the policy's parity tests, beside measuring cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model_providers.qwen3_vl.vision import VisionBlock
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.layers.attention import SDPACoreAttention
from prism_megatron.engine.layers.specs import DecoderLayer
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.runtime import World
from prism_megatron.parity import ranks
from prism_megatron.parity.compare import Outcome
from prism_megatron.parity.probe import Sample
from prism_megatron.parity.ranks import build_engine, run_samples
from prism_megatron.parity.samples import sample_sets


def outcome_of(world: World, folder: Path, samples: Sequence[Sample], num_microbatches: int = 1) -> Outcome | None:
    """The padded samples' outcome."""
    shape = Qwen3VLShape.from_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "num_microbatches", lambda _parallel: num_microbatches)
        return run_samples(build_engine(world, folder, shape, dtype=torch.float32), shape, samples, pack=False).outcome


def payload_rows(world: World, folder: Path, samples: Sequence[Sample]) -> int:
    """Rows of what this stage's chunk returned for its last micro-batch."""
    shape, lengths = Qwen3VLShape.from_folder(folder), []
    engine = build_engine(world, folder, shape, dtype=torch.float32)

    def note(_module: object, _inputs: object, output: VocabularyOutput | torch.Tensor) -> None:
        lengths.append(len(output.hidden_L_B_H if isinstance(output, VocabularyOutput) else output))

    engine.modules[0].register_forward_hook(note)
    run_samples(engine, shape, samples, pack=True)
    return lengths[-1]


COUNTED = {
    "layer": (DecoderLayer, "_layer"),
    "attention core": (SDPACoreAttention, "forward"),
    "mlp": (DecoderLayer, "_transform"),
    "vision block": (VisionBlock, "forward"),
}


def forward_counts(world: World, folder: Path, recompute: RecomputeConfig) -> dict[str, int]:
    """How often each of ``COUNTED`` ran in one step."""
    counts = dict.fromkeys(COUNTED, 0)
    shape = Qwen3VLShape.from_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, (kind, method) in COUNTED.items():
            patch.setattr(kind, method, _counted(getattr(kind, method), counts, name))
        engine = build_engine(world, folder, shape, dtype=torch.float32, execution=Execution(recompute))
        run_samples(engine, shape, sample_sets()["one image"], pack=False)
    return counts


def _counted(original: Callable[..., Any], counts: dict[str, int], name: str) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        counts[name] += 1
        return original(*arguments, **keywords)

    return run
