"""A frozen vision tower: no graph of it, no change of it, and its features from disk in every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from model_providers.qwen3_vl.vision import VisionModel
from prism_megatron.config.architecture.model import ALL_VISION, FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.vision_cache import VisionCacheConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.engine.vision.cache import CacheCounts
from prism_megatron.testing import GlooWorld
from prism_megatron.training.frozen_vision import tower_identity, use_vision_cache
from prism_megatron.types import ImageInput
from tests.distributed import tiny

STEPS = range(2)
LAYOUTS = {
    "TP2": (2, ParallelConfig(tp=2)),
    "TP2-SP": (2, ParallelConfig(tp=2, sp="on")),
    "PP2": (2, ParallelConfig(pp=2)),
    "PP2-VPP2": (2, ParallelConfig(pp=2, vpp=2)),
    "CP2": (2, ParallelConfig(cp=2)),
    "DP2": (2, ParallelConfig()),
    "TP2-CP2": (4, ParallelConfig(tp=2, cp=2)),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def frozen(world: World, freeze: tuple[FreezeGroup, ...] = ALL_VISION) -> MegatronEngine:
    shape = Qwen3VLShape.from_dict(tiny.CONFIG)
    engine = MegatronEngine(
        name="policy",
        provider=Qwen3VLProvider(shape, freeze=freeze),
        world=world,
        dtype=torch.float32,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5),
        total_steps=20,
    )
    engine.load_hf(tiny.weights(tiny.provider()))
    return engine


def losses(engine: MegatronEngine) -> list[tuple[float, float]]:
    history = []
    for step in STEPS:
        batches, loss = tiny.batches_of(engine.world, step)
        if engine.world.parallel.cp > 1:
            batches, loss = tiny.context_parallel_batches_of(engine.world, step)
        output = engine.forward_backward(batches, loss)
        history.append((output.sums["loss"], engine.step().grad_norm))
    return history


def train_on_found(world: World, folder: Path) -> tuple[list[tuple[float, float]], CacheCounts]:
    """As ``train``, with a tower that cannot be run."""
    with mock.patch.object(VisionModel, "forward", side_effect=AssertionError("an image was encoded")):
        return train(world, folder, own_folders=False)


def train(world: World, folder: Path | None, own_folders: bool) -> tuple[list[tuple[float, float]], CacheCounts]:
    engine = frozen(world)
    if folder is not None:
        use_vision_cache(engine, VisionCacheConfig(folder / str(world.rank) if own_folders else folder))
    history = losses(engine)
    return history, CacheCounts() if engine.vision_cache is None else engine.vision_cache.take_counts()


@pytest.fixture(scope="module")
def filled(gloo: GlooWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, float]]]:
    """A folder that one rank filled, and what it trained without one."""
    folder = tmp_path_factory.mktemp("features")
    ((history, _),) = gloo.run(train, None, False, num_ranks=1)
    ((cached, counts),) = gloo.run(train, folder, False, num_ranks=1)
    assert cached == history
    assert counts == CacheCounts(images=4, found=0)
    return folder, history


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_the_features_of_another(
    gloo: GlooWorld, filled: tuple[Path, list[tuple[float, float]]], layout: str
) -> None:
    """Claim: what one rank kept is all found elsewhere, no tower runs, and losses and norms are the same (1e-5)."""
    folder, history = filled
    ranks, parallel = LAYOUTS[layout]
    results = gloo.run(train_on_found, folder, num_ranks=ranks, parallel=parallel)
    for mine, wanted in zip(results[0][0], history, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5)
    assert sum(counts.images for _, counts in results) == sum(counts.found for _, counts in results) == 4


@pytest.mark.parametrize("layout", ["TP2", "CP2"])
def test_ranks_that_find_other_images_encode_them_together(
    gloo: GlooWorld, filled: tuple[Path, list[tuple[float, float]]], layout: str, tmp_path: Path
) -> None:
    """Claim: ranks that share a micro-batch and see folders with other contents neither hang nor differ."""
    _, history = filled
    ranks, parallel = LAYOUTS[layout]
    gloo.run(train, tmp_path / "0", False, num_ranks=1)
    for path in sorted((tmp_path / "0").rglob("*.safetensors"))[::2]:
        path.unlink()
    gloo.run(train, tmp_path / "1", False, num_ranks=1)
    for path in sorted((tmp_path / "1").rglob("*.safetensors"))[1::2]:
        path.unlink()
    results = gloo.run(train, tmp_path, True, num_ranks=ranks, parallel=parallel)
    for mine, wanted in zip(results[0][0], history, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5)
    assert sum(counts.found for _, counts in results) == 0


def identities(world: World) -> tuple[str, str, str]:
    engine = frozen(world)
    plain = tower_identity(engine)
    for module in engine.modules:
        for name, parameter in module.named_parameters():
            if name == "decoder.layers.0.mlp.linear_fc2.weight":
                parameter.data[0, 0] += 1.0
    language = tower_identity(engine)
    for module in engine.modules:
        for name, parameter in module.named_parameters():
            if name == "vision_model.deepstack_mergers.1.linear_fc2.bias":
                parameter.data[0] = torch.nextafter(parameter.data[0], torch.tensor(9.0))
    return plain, language, tower_identity(engine)


def reshaped(world: World) -> list[str]:
    """Of one tower's weights, read as towers with other heads, taps and sides of the grid."""
    engine, found = frozen(world), []
    provider: Any = engine.provider
    vision = provider.shape.vision
    for changes in ({}, {"heads": 2 * vision.heads}, {"taps": tuple(tap + 1 for tap in vision.taps)}):
        provider.shape = replace(provider.shape, vision=replace(vision, **changes))
        found.append(tower_identity(engine))
    return found


def test_equal_weights_of_another_shape_are_another_tower(gloo: GlooWorld) -> None:
    """Claim: heads and taps leave no trace in the shapes of weights, and make other features."""
    (found,) = gloo.run(reshaped, num_ranks=1)
    assert len(set(found)) == 3


def test_a_tower_is_known_by_itself_alone(gloo: GlooWorld) -> None:
    """Claim: the same in every layout and whatever the language tower; another for one bit of one projector's bias."""
    ((alone, language, other),) = gloo.run(identities, num_ranks=1)
    assert alone == language != other
    for ranks, parallel in LAYOUTS.values():
        assert {one[0] for one in gloo.run(identities, num_ranks=ranks, parallel=parallel)} == {alone}


def other_keys(world: World, folder: Path) -> list[str]:
    engine = frozen(world)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(16, 96)).astype(np.float32)
    use_vision_cache(engine, VisionCacheConfig(folder))
    assert engine.vision_cache is not None
    images = (
        ImageInput(pixels, (1, 4, 4)),
        ImageInput(pixels.copy(), (1, 4, 4)),
        ImageInput(pixels, (1, 2, 8)),
        ImageInput(pixels * np.float32(1.0000002), (1, 4, 4)),
        ImageInput((pixels - np.float32(0.01)), (1, 4, 4)),
        ImageInput(pixels.reshape(8, 192), (1, 4, 4)),
    )
    keys = [engine.vision_cache.key(image) for image in images]
    engine.dtype = torch.bfloat16
    use_vision_cache(engine, VisionCacheConfig(folder))
    return [*keys, engine.vision_cache.key(ImageInput(pixels, (1, 4, 4)))]


def test_other_preprocessing_finds_nothing_of_the_old(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: equal patches are one key; another grid, mean, scale, patch size or dtype is another each."""
    (keys,) = gloo.run(other_keys, tmp_path, num_ranks=1)
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


def test_features_of_other_weights_are_not_used(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: a policy whose tower differs in one weight finds none of what another kept in the folder."""
    ((first, again),) = gloo.run(two_towers, tmp_path, num_ranks=1)
    assert (first, again) == (CacheCounts(images=4, found=0), CacheCounts(images=4, found=0))


def two_towers(world: World, folder: Path) -> tuple[CacheCounts, CacheCounts]:
    counts = []
    for change in (0.0, 1e-3):
        engine = frozen(world)
        for name, parameter in engine.modules[0].named_parameters():
            if name == "vision_model.blocks.2.mlp.linear_fc1.bias":
                parameter.data[0] += change
        use_vision_cache(engine, VisionCacheConfig(folder))
        losses(engine)
        assert engine.vision_cache is not None
        counts.append(engine.vision_cache.take_counts())
    return counts[0], counts[1]


@dataclasses.dataclass
class Graph:
    """What a pass kept of the vision tower for its backward, and whether its output leads back to it."""

    saved_bytes: int
    has_graph: bool


def graph_of(world: World, freeze: tuple[FreezeGroup, ...]) -> Graph:
    engine = frozen(world, freeze)
    saved: list[int] = []
    found: list[bool] = []

    def forward(vision: VisionModel, pixels: Tensor, grids: list[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = VisionModel.forward(vision, pixels, grids)
        found.extend(output.requires_grad for output in outputs)
        return outputs

    vision = engine.modules[0].vision_model
    vision.forward = lambda pixels, grids: forward(vision, pixels, grids)
    losses(engine)
    assert found
    return Graph(sum(saved), any(found))


def test_a_frozen_tower_keeps_no_graph(gloo: GlooWorld) -> None:
    """Claim: not a byte is saved for a backward pass of it; of a tower whose projector trains, only the projector's."""
    (nothing,) = gloo.run(graph_of, ALL_VISION, num_ranks=1)
    (projector,) = gloo.run(graph_of, ("vision",), num_ranks=1)
    (everything,) = gloo.run(graph_of, (), num_ranks=1)
    assert nothing == Graph(0, has_graph=False)
    assert projector.has_graph and everything.has_graph
    assert 0 < projector.saved_bytes < 0.75 * everything.saved_bytes


def weights_after(world: World, folder: Path) -> tuple[set[str], set[str]]:
    engine = frozen(world)
    use_vision_cache(engine, VisionCacheConfig(folder))
    before = tiny.exported(engine)
    losses(engine)
    losses(engine)
    after = tiny.exported(engine)
    same = {name for name in before if torch.equal(before[name], after[name])}
    return same, {name for name in before if name.startswith("model.visual.")}


def test_frozen_weights_are_bit_identical_after_training(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: those of vision tower and projector stay, with features from disk too; every other one moves."""
    same, visual = gloo.run(weights_after, tmp_path, num_ranks=2, parallel=ParallelConfig(tp=2))[0]
    assert same == visual
