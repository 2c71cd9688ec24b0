"""Each rank saves and loads its own part: the numbers are Megatron's, the memory is not more than the part.

``tests/distributed/megatron_form.py`` is the oracle: Megatron's own save, which gathers, and its own reader.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.checkpoints.torch_dist_writer import write_data_file
from prism_megatron.engine import checkpoint, pieces
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld
from tests.distributed import megatron_form
from tests.distributed.checkpoint_ranks import FOLDERS, build, files, step
from tests.live_storages import LiveStorages

LAYOUTS = {
    "DP2": (2, ParallelConfig()),
    "TP2-DP2": (4, ParallelConfig(tp=2)),
    "PP2-DP2": (4, ParallelConfig(pp=2)),
    "TP2-EP2-DP2": (4, ParallelConfig(tp=2, ep=2)),
    "TP2-DP2, replicated": (4, ParallelConfig(tp=2, distributed_optimizer=False)),
}
BOUND = 1.2
"""Extra bytes of a rank, in parts of its own share of the checkpoint."""
BLOCK_BYTES = 10_000
"""Less than half of the larger matrices."""


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def trained(world: World, name: str, *, offload: bool = False) -> dict[str, MegatronEngine]:
    """The roles of a folder in bf16 after a step each; their moments and masters are no zeros."""
    engines: dict[str, MegatronEngine] = {
        role: build(world, kind, dtype=torch.bfloat16, offload=offload) for role, kind in FOLDERS[name].items()
    }
    for engine in engines.values():
        step(engine, 0)
    return engines


def save_both_ways(world: World, root: Path) -> None:
    """Of the same state in bf16: ours, and Megatron's; of the players ours in small blocks as well."""
    for name, roles in FOLDERS.items():
        engines = trained(world, name)
        megatron_form.save(root / f"{name}, Megatron's", engines, {}, files(roles))
        checkpoint.save(root / f"{name}, ours", engines, {}, models=files(roles))
        if name == "players":
            with mock.patch.object(pieces, "BLOCK_BYTES", BLOCK_BYTES):
                checkpoint.save(root / f"{name}, in blocks", engines, {}, models=files(roles))


Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(gloo: GlooWorld, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder where :func:`save_both_ways` has saved in a layout."""

    @functools.cache
    def root_of(layout: str) -> Path:
        root, (ranks, parallel) = tmp_path_factory.mktemp("saved"), LAYOUTS[layout]
        gloo.run(save_both_ways, root, num_ranks=ranks, parallel=parallel)
        return root

    return root_of


def assert_same(found: TorchDistFolder, expected: TorchDistFolder) -> None:
    assert list(found.keys()) == list(expected.keys())
    for key in expected.keys():  # noqa: SIM118  # a folder is no mapping
        assert found.shape(key) == expected.shape(key) and found.dtype(key) == expected.dtype(key), key
        rows = expected.shape(key)[0]
        assert torch.equal(found.read(key, 0, rows), expected.read(key, 0, rows)), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_each_rank_writes_makes_what_megatron_gathers(saved: Saved, layout: str) -> None:
    """Claim: names, shapes, formats and every bit are those that Megatron's own save gives, of all three folders.

    In bf16 with fp32 masters, and however small the blocks are.
    """
    root = saved(layout)
    for name in FOLDERS:
        expected, ours = TorchDistFolder(root / f"{name}, Megatron's"), TorchDistFolder(root / f"{name}, ours")
        assert any(".exp_avg_sq." in key for key in expected.keys())  # noqa: SIM118  # a folder is no mapping
        assert_same(ours, expected)
    blocks, ours = (TorchDistFolder(root / f"players, {form}") for form in ("in blocks", "ours"))
    assert_same(blocks, ours)
    assert sum(map(blocks.num_chunks, ours.keys())) > sum(map(ours.num_chunks, ours.keys())), "blind: none is cut"
    num_ranks = LAYOUTS[layout][0]
    sizes = [(root / "players, ours" / f"__{rank}_0.distcp").stat().st_size for rank in range(num_ranks)]
    print(f"{layout}: KB of each rank's file {[round(size / 1000) for size in sizes]}")


def read_by_megatron(_world: World, folder: Path) -> dict[str, Any]:
    return {key: tensor.clone() for key, tensor in dist_checkpointing.load_plain_tensors(str(folder)).items()}


@pytest.mark.parametrize("form", ["ours", "in blocks"])
def test_megatron_reads_what_ranks_wrote(gloo: GlooWorld, saved: Saved, form: str) -> None:
    """Claim: Megatron's reader, of pieces that are no regular grid, finds every tensor as it is. Exact."""
    folder = TorchDistFolder(saved("TP2-DP2") / f"players, {form}")
    found = gloo.run(read_by_megatron, folder.folder, num_ranks=1)[0]
    assert found.keys() == set(folder.keys())
    for key, tensor in found.items():
        assert torch.equal(tensor, folder.read(key, 0, folder.shape(key)[0])), key


def load_and_save(world: World, source: Path, target: Path, form: str) -> None:
    for name, roles in FOLDERS.items():
        engines: dict[str, MegatronEngine] = {
            role: build(world, kind, dtype=torch.bfloat16) for role, kind in roles.items()
        }
        checkpoint.load(source / f"{name}, {form}", engines)
        checkpoint.save(target / name, engines, {}, models=files(roles))


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "loaded", "form"),
    [
        ("DP2", ParallelConfig(tp=2, pp=2), "ours"),
        ("DP2", ParallelConfig(tp=2, pp=2), "Megatron's"),
        ("TP2-EP2-DP2", ParallelConfig(), "ours"),
    ],
    ids=["DP2 to TP2-PP2", "DP2 to TP2-PP2, of an older version", "TP2-EP2-DP2 to DP4"],
)
def test_weights_masters_and_moments_move_to_another_layout(
    *, gloo: GlooWorld, saved: Saved, tmp_path: Path, layout: str, loaded: ParallelConfig, form: str
) -> None:
    """Claim: what a layout saved and another one loaded is saved from there with the same bits, of all tensors.

    What versions of ours before saved is what Megatron gathers and writes.
    """
    gloo.run(load_and_save, saved(layout), tmp_path, form, parallel=loaded)
    for name in FOLDERS:
        assert_same(TorchDistFolder(tmp_path / name), TorchDistFolder(saved(layout) / f"{name}, ours"))


@dataclass(frozen=True)
class Cost:
    """What saving or loading took of a rank's memory."""

    share: int
    """bytes that it writes, or holds to be loaded"""
    peak: int
    """most bytes beyond what was there"""
    left: int
    """bytes beyond what was there, when all is done"""


def _counted(counter: LiveStorages) -> Any:
    def write(*arguments: Any) -> Any:
        with counter:
            return write_data_file(*arguments)

    return write


WAYS = ("at once", "aside", "load", "Megatron's")


def costs_of(world: World, root: Path, offload: bool) -> dict[str, Cost]:
    """Of both players, each way in turn: a save at once and aside, a load, and Megatron's own look at the state."""
    engines = trained(world, "players", offload=offload)
    found: dict[str, Cost] = {}
    for way in WAYS:
        parts = [piece for engine in engines.values() for piece in engine.pieces()]
        share = sum(piece.tensor.nbytes for piece in parts if piece.is_written or way == "load")
        del parts
        with LiveStorages() as counter:
            if way == "load":
                checkpoint.load(root / "aside", engines)
            elif way == "Megatron's":
                for engine in engines.values():
                    megatron_form.sharded_state(engine)
            else:
                with mock.patch("prism_megatron.engine.saving.write_data_file", _counted(counter)):
                    saving = checkpoint.begin(root / way, engines, {}, models={}, aside=way == "aside")
                    saving.finish()
                del saving
        found[way] = Cost(share, counter.peak, counter.now)
    return found


@pytest.mark.long
def test_a_save_and_a_load_take_no_more_than_a_ranks_own_part(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: both players, saved and loaded at DP1, DP2 and DP4, never take more than 1.2 of a rank's share besides.

    Aside it is the share itself, once; at once and when loading, a tensor or two. All of it is given back. Megatron's
    way takes a multiple of the share that grows with the data-parallel ranks: the count sees.
    """
    costs: dict[tuple[int, str, bool], list[Cost]] = {}
    for ranks, offload in itertools.product((1, 2, 4), (False, True)):
        found = gloo.run(costs_of, tmp_path / f"{ranks} {offload}", offload, num_ranks=ranks)
        costs |= {(ranks, way, offload): [of_rank[way] for of_rank in found] for way in WAYS}
    print("\nway         DP  offload   share KB  peak KB  peak/share   of the rank where it is largest")
    for (ranks, way, offload), found in costs.items():
        worst = max(found, key=lambda cost: cost.peak / cost.share)
        print(f"{way:<11} {ranks:>2}  {'on' if offload else 'off':<7} {worst.share / 1e3:>9.1f} "
              f"{worst.peak / 1e3:>8.1f}  {worst.peak / worst.share:>9.2f}")  # fmt: skip
    for (ranks, way, offload), found in costs.items():
        ratios = [cost.peak / cost.share for cost in found]
        if way == "Megatron's":
            assert ranks == 1 or min(ratios) > ranks, (ranks, offload, ratios)
            continue
        assert max(ratios) <= BOUND, (ranks, way, offload, ratios)
        assert way != "aside" or min(ratios) >= 1.0, "blind: the copies are not seen"
        assert way == "aside" or max(ratios) < 0.25, (ranks, way, offload, ratios)
        assert max(cost.left for cost in found) < 2000, "a load makes new counts of steps, 4 bytes a parameter"
