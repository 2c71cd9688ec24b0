"""A policy with experts is handed to servers one expert at a time, whatever layout its folder has.

Oracle: the same experts stored by hand under their own names. The fake takes those names, as Qwen3-VL-MoE of SGLang
does; what SGLang then makes of them is for ``tests/sglang``.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prism_megatron.conversion.announced_weights import AnnouncedWeights
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.weights import Transport
from tests.mini_experts import write_mini_with_experts
from tests.unit.rollout.attached import IMPATIENT
from tests.unit.rollout.fake_sglang import KEY, UPDATES, FakeSGLang, running, unpack
from tests.unit.rollout.tiny_qwen import NoSegments


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[ExpertLayout, Path]:
    root = tmp_path_factory.mktemp("policies")
    return {layout: write_mini_with_experts(root / layout, layout) for layout in get_args(ExpertLayout)}


@pytest.fixture(scope="module")
def weights(folders: dict[ExpertLayout, Path]) -> dict[str, Tensor]:
    return {name: 2.0 * tensor for name, tensor in load_file(folders["per_expert"] / "model.safetensors").items()}


def attach(fake: FakeSGLang, folder: Path, spool: Path, *, transport: Transport, bucket_bytes: int) -> SGLangRollout:
    return SGLangRollout(
        folder,
        NoSegments(),
        urls=[fake.url],
        api_key=KEY,
        end_token_ids=[488],
        spool=spool,
        options=SGLangOptions(transport=transport, bucket_bytes=bucket_bytes, patience=IMPATIENT),
    )


@pytest.mark.parametrize(
    ("transport", "stored"), [("tensor", "hub"), ("disk", "transformers"), ("group", "per_expert")]
)
def test_each_expert_arrives_under_its_own_name(
    transport: Transport,
    stored: ExpertLayout,
    folders: dict[ExpertLayout, Path],
    weights: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """Bit for bit, and no call carries more than half a bucket, which no layer's experts together would fit in."""
    limit = max(tensor.nbytes for tensor in weights.values())
    with running(image_token_id=498, folder=folders["per_expert"]) as fake:
        engine = attach(fake, folders[stored], tmp_path, transport=transport, bucket_bytes=2 * limit)
        assert engine.expert_layout == "per_expert"
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        engine.update_weights(AnnouncedWeights(shapes, iter(weights.items())), 1)
        engine.close()
        assert fake.version == "1" and fake.loaded == weights.keys() == fake.weights.keys()
        assert all(torch.equal(fake.weights[name], tensor) for name, tensor in weights.items())
        bodies = [body for path, body in fake.calls if path == UPDATES[0]]
        sizes = [sum(t.nbytes for t in unpack(body["serialized_named_tensors"][0]).values()) for body in bodies]
        assert bool(sizes) == (transport == "tensor") and max(sizes, default=0) <= limit


def test_fused_experts_are_refused_before_anything_is_sent(folders: dict[ExpertLayout, Path], tmp_path: Path) -> None:
    """A server would take a fused tensor of transformers' layout for one of the hub's."""
    fused = load_file(folders["transformers"] / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in fused.items()}
    with running(image_token_id=498, folder=folders["per_expert"]) as fake:
        engine = attach(fake, folders["transformers"], tmp_path, transport="tensor", bucket_bytes=2**20)
        with pytest.raises(WeightSyncError, match=r"no weight '.*experts\.\w+_proj'; export the policy"):
            engine.update_weights(AnnouncedWeights(shapes, iter(fused.items())), 1)
        engine.close()
        assert not fake.loaded and "/pause_generation" not in fake.paths()
