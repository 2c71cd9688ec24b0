"""Known defects, put back on every rank for one measurement; and what a rank counts for the other tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import checkpoint as megatron_checkpoint
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from model_providers.qwen3_vl import balance, deepstack, model, provider
from model_providers.qwen3_vl.decoder import Decoder
from model_providers.qwen3_vl.deepstack import Ints, VisualPlaces, VisualRows
from model_providers.qwen3_vl.vision import VisionBlock, VisionMLP, VisionModel
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.config.recompute import RecomputeConfig
from prism_megatron.engine.attention import SDPACoreAttention, Sequences
from prism_megatron.engine.batch import Batch
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
    DEFECTS[defect](patch)


def _no_deepstack(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VisualRows, "add", lambda _self, hidden, _rows: hidden)


def _plain_rope(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(deepstack, "row_positions", lambda visual, _frames: np.tile(np.arange(len(visual)), (3, 1)))


def _tanh_in_mergers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VisionMLP, "__init__", _with_tanh(VisionMLP.__init__))


def _taps_sliced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "copy_to_tensor_model_parallel_region", lambda tap, **_group: tap)


def _taps_in_a_recomputed_list(patch: pytest.MonkeyPatch) -> None:
    """Megatron's checkpoint gives no graph to tensors inside a list."""
    whole = VisionModel.forward

    def forward(vision: VisionModel, pixels_P_D: Tensor, grid_thw: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        def features_and_list(pixels_P_D: Tensor) -> tuple[Tensor, list[Tensor]]:
            features, *taps = whole(vision, pixels_P_D, grid_thw)
            return features, taps

        features, taps = megatron_checkpoint(features_and_list, False, pixels_P_D.clone().requires_grad_())
        return (features, *taps)

    patch.setattr(VisionModel, "forward", forward)


def _taps_stay_on_the_first_stage(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "pending_taps", lambda _num_taps, _first_layer: range(0))


def _every_virtual_stage_is_the_first(patch: pytest.MonkeyPatch) -> None:
    def decoder(*arguments: Any, **keywords: Any) -> Decoder:
        return Decoder(*arguments, **(keywords | {"vp_stage": 0}))

    patch.setattr(model, "Decoder", decoder)


def _packed_samples_see_each_other(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequences, "runs", _one_run)


def _packed_samples_take_the_first_angles(patch: pytest.MonkeyPatch) -> None:
    """Megatron's packed rotary starts its table again for every sequence, whatever that sequence shows."""

    def locate(batch: Batch, shape: Qwen3VLShape) -> tuple[VisualPlaces, Ints]:
        places, positions_3_B_S = deepstack.locate(batch, shape)
        for (row, start), slot in zip(batch.places(), batch.slots, strict=True):
            positions_3_B_S[:, row, start : start + slot] = positions_3_B_S[:, row, :slot]
        return places, positions_3_B_S

    patch.setattr(model, "locate", locate)


def _image_gradients_stay_on_their_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        balance,
        "gather_from_sequence_parallel_region",
        functools.partial(gather_from_sequence_parallel_region, tensor_parallel_output_grad=False),
    )


def _images_of_other_ranks_dropped(patch: pytest.MonkeyPatch) -> None:
    def gather(own: Tensor, *, group: ProcessGroup) -> Tensor:
        parts = [torch.zeros_like(own) for _ in range(group.size())]
        parts[group.rank()] = own
        return torch.cat(parts)

    patch.setattr(balance, "gather_from_sequence_parallel_region", gather)


def _ranks_without_images_skip_the_gather(patch: pytest.MonkeyPatch) -> None:
    def visual_features(vision: VisionModel, batch: Batch, group: ProcessGroup) -> list[Tensor]:
        patches = batch.grid_thw_N_3.prod(dim=1).tolist()
        if balance.assign(patches, group.size())[group.rank()]:
            return balance.visual_features(vision, batch, group)
        none = balance.pixels_of([], vision.shape.patch_dim)
        return [x.expand(sum(patches) // vision.shape.merge**2, -1) for x in vision(none, [])]

    patch.setattr(model, "visual_features", visual_features)


def _batched_p2p(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        provider,
        "TransformerConfig",
        lambda **settings: TransformerConfig(**(settings | {"overlap_p2p_comm": False, "batch_p2p_comm": True})),
    )


DEFECTS: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no DeepStack": _no_deepstack,
    "plain RoPE": _plain_rope,
    "tanh GELU in mergers": _tanh_in_mergers,
    "taps sliced under SP": _taps_sliced,
    "taps recomputed in a list": _taps_in_a_recomputed_list,
    "taps stay on the first stage": _taps_stay_on_the_first_stage,
    "every virtual stage takes itself for the first": _every_virtual_stage_is_the_first,
    "packed samples see each other": _packed_samples_see_each_other,
    "packed samples take the first one's angles": _packed_samples_take_the_first_angles,
    "image gradients kept by their rank under CP": _image_gradients_stay_on_their_rank,
    "images of other ranks dropped under CP": _images_of_other_ranks_dropped,
    "ranks without an image skip the gather": _ranks_without_images_skip_the_gather,
    "batched p2p under VPP": _batched_p2p,
}
"""By name; most are found in other implementations of this model."""


def _one_run(sequences: Sequences) -> Iterator[tuple[int, int]]:
    yield sum(sequences.slots), 1


def _with_tanh(original: Callable[..., None]) -> Callable[..., None]:
    def build(self: VisionMLP, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **(keywords | {"gelu": "tanh"}))

    return build


def payload_rows(world: World, folder: Path, samples: Sequence[Sample]) -> int:
    """Rows of what this stage's chunk returned for its last micro-batch."""
    shape, lengths = Qwen3VLShape.from_folder(folder), []
    engine = build_engine(world, folder, shape, dtype=torch.float32)
    engine.modules[0].register_forward_hook(lambda _module, _inputs, output: lengths.append(len(output)))
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
        engine = build_engine(world, folder, shape, dtype=torch.float32, recompute=recompute)
        run_samples(engine, shape, sample_sets()["one image"], pack=False)
    return counts


def _counted(original: Callable[..., Any], counts: dict[str, int], name: str) -> Callable[..., Any]:
    def run(*arguments: Any, **keywords: Any) -> Any:
        counts[name] += 1
        return original(*arguments, **keywords)

    return run
