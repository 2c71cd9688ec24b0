"""Ranks hand a policy over together: what each gathers, sends and writes, and what they agree on when a server fails.

The servers are fakes in the test's process; the ranks, their collectives and their HTTP are real. ``benchmarks/
handover_shares.py`` counts the same at the widths of 2B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.hf.reader import INDEX
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.weights import LostVersionError, Transport
from prism_megatron.rollout.weight_spool import spool_folder
from prism_megatron.sampling.handover import Handover, SharedHandover
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.testing import GlooWorld
from prism_megatron.training.roles import build_policy
from tests.handover_counts import Counts, counting
from tests.lazy_groups import lazy_collectives
from tests.mini_experts import write_mini_with_experts
from tests.unit.rollout.fake_sglang import FOLDER, KEY, FakeSGLang, running
from tests.unit.rollout.tiny_qwen import NoSegments
from tests.unit.rollout.weight_servers import BY_TENSOR, assert_holds
from tests.unit.rollout.weights import mini_weights
from tests.waiting import wait_for

RANKS = 4


@dataclass(frozen=True)
class Served:
    """Servers of a folder's model, and where weights are spooled for them."""

    folder: Path
    urls: tuple[str, ...]
    spool: Path
    transport: Transport


def start(world: World, served: Served) -> tuple[MegatronEngine, SharedRollout]:
    shape = Qwen3VLShape.from_folder(served.folder)
    policy = build_policy(served.folder, shape, world=world, dtype=torch.float32, optimizer=None, total_steps=1)
    engine = SGLangRollout(
        served.folder,
        NoSegments(),
        urls=served.urls,
        api_key=KEY,
        end_token_ids=[488],
        spool=served.spool,
        options=SGLangOptions(transport=served.transport, bucket_bytes=2**18),
    )
    return policy, SharedRollout(engine, world)


def times(policy: MegatronEngine, factor: float) -> None:
    with torch.no_grad():
        for module in policy.modules:
            for parameter in module.parameters():
                parameter.mul_(factor)


def both_ways(world: World, served: Served) -> tuple[Counts, Counts]:
    """What a rank has to do for a hand-over of all of it by rank 0, and by shares."""
    policy, rollout = start(world, served)
    found = []
    for version, kind in enumerate((Handover, SharedHandover)):
        times(policy, 2.0)
        with counting() as counts, lazy_collectives():
            kind(policy, rollout, 2**15)(version, changed_only=False)
        wait_for((spool_folder(served.spool, version) / INDEX).exists)  # of what is written aside
        dist.barrier()
        found.append(counts)
    rollout.close()
    return found[0], found[1]


def one_version(world: World, served: Served) -> int | None:
    policy, rollout = start(world, served)
    SharedHandover(policy, rollout, 2**15)(3, changed_only=False)
    version = rollout.policy_version
    rollout.close()
    return version


def two_versions(world: World, served: Served) -> tuple[tuple[int | None, ...], str, bool]:
    """Versions after each of two hand-overs, what the second one says if it fails, and whether none is left."""
    policy, rollout = start(world, served)
    handover = SharedHandover(policy, rollout, 2**15)
    versions, message, is_lost = [], "", False
    for version in (1, 2):
        try:
            handover(version, changed_only=False)
        except WeightSyncError as error:
            message, is_lost = str(error), isinstance(error, LostVersionError)
        versions.append(rollout.policy_version)
        times(policy, 2.0)
        dist.barrier()
    rollout.close()
    return tuple(versions), message, is_lost


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(image_token_id=498)) for _ in range(2)]


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(RANKS, timeout_s=180.0) as gloo:
        yield gloo


def served_by(fakes: Sequence[FakeSGLang], spool: Path, transport: Transport = "tensor") -> Served:
    return Served(FOLDER, tuple(fake.url for fake in fakes), spool, transport)


def test_each_stage_gathers_sends_and_writes_its_own(gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """Claim: at TP2·PP2 by groups, rank 0 sends and writes at most 0.75 of what it does alone, and gathers half of
    that; all ranks together send each byte once a server and write it once; servers hold the new weights.

    The mini's vision tower, all of it on the first stage, is a larger part of it than any published model's: the
    benchmark holds 0.5 at widths of 2B.
    """
    served = served_by(fakes, tmp_path, "group")
    found = gloo.run(both_ways, served, parallel=ParallelConfig(tp=2, pp=2))
    print("\n".join(f"rank {rank}: alone {alone}, shared {shared}" for rank, (alone, shared) in enumerate(found)))
    alone = [counts for counts, _ in found]
    shared = [counts for _, counts in found]
    total = sum(4 * tensor.numel() for _, tensor in mini_weights())
    assert [one.sent for one in alone] == [2 * total, 0, 0, 0] and [one.written for one in alone] == [total, 0, 0, 0]
    assert sum(one.sent for one in shared) == 2 * total and sum(one.written for one in shared) == total
    assert shared[0].sent <= 0.75 * alone[0].sent and shared[0].written <= 0.75 * alone[0].written
    assert all(one.sent == 0 and one.written == 0 and one.gathered == 0 for one in (shared[1], shared[3]))
    for one in shared:
        assert one.gathered <= one.written / 2 * 1.05, "a sender receives the other half of what is cut, and padding"
    assert sum(one.gathered for one in shared) < sum(one.gathered for one in alone) / 4
    for fake in fakes:
        assert_holds(fake, 4.0, 1)


def test_expert_ranks_send_their_own_experts(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: at EP2·PP2 four senders bring a server, bit for bit, what the folder with single experts holds."""
    source = write_mini_with_experts(tmp_path / "served", "per_expert")
    with running(image_token_id=498, folder=source) as fake:
        expected = {name: tensor.clone() for name, tensor in fake.weights.items()}
        fake.weights = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        served = Served(source, (fake.url,), tmp_path / "run", "tensor")
        assert gloo.run(one_version, served, parallel=ParallelConfig(ep=2, pp=2)) == [3] * RANKS
        assert fake.loaded == expected.keys()
        assert all(torch.equal(fake.weights[name], tensor) for name, tensor in expected.items())


def test_a_failed_hand_over_is_made_once_more_by_all_ranks(
    gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Claim: whichever rank's piece a server refuses, all ranks begin again and end with the version."""
    pieces = 12
    served, load, seen = served_by(fakes, tmp_path), fakes[1].load, [0]

    def refusing(tensors: dict[str, torch.Tensor]) -> None:
        seen[0] += 1
        if fakes[1].version == "1" and seen[0] > pieces:
            seen[0] = -1000
            fakes[1].refuse[BY_TENSOR] = 1
        load(tensors)

    fakes[1].load = refusing  # type: ignore[method-assign]
    for versions, message, _ in gloo.run(two_versions, served, parallel=ParallelConfig(tp=2, pp=2)):
        assert versions == (1, 2) and message == ""
    assert seen[0] < 0, "blind: nothing was refused"
    for fake in fakes:
        assert_holds(fake, 2.0, 2)


def test_ranks_agree_that_no_version_is_left(gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """Claim: a server that refuses again ends the hand-over on every rank with one message, and nobody hangs."""
    served = served_by(fakes, tmp_path)
    load = fakes[1].load

    def refusing(tensors: dict[str, torch.Tensor]) -> None:
        if fakes[1].version == "1":
            fakes[1].refuse[BY_TENSOR] = 10**6
        load(tensors)

    fakes[1].load = refusing  # type: ignore[method-assign]
    found = gloo.run(two_versions, served, parallel=ParallelConfig(tp=2, pp=2))
    for versions, message, is_lost in found:
        assert versions == (1, None) and is_lost
        assert message == found[0][1] and f"{BY_TENSOR} answers HTTP 400" in message
    assert not any(fake.paused for fake in fakes), "the run has ended, and servers are not ours alone"
