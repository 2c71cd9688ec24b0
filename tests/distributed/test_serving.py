"""One set of servers for several ranks: the main rank hands weights over, all ranks sample, and none is left waiting.

The servers are fakes in the test's process; the ranks, their collectives and their HTTP are real.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.config.cli import parse
from prism_megatron.config.convert import ToMegatronConfig
from prism_megatron.config.optimizer import OptimizerConfig
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.checkpoint_folder import files_folder
from prism_megatron.conversion.hf_reader import HFFolder
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.sglang import SGLangRollout
from prism_megatron.stages.assembly import build_policy
from prism_megatron.stages.convert import to_megatron
from prism_megatron.stages.serving import API_KEY, SharedRollout, build_served_rollout
from prism_megatron.testing import GlooWorld
from prism_megatron.types import Prompt
from tests.unit.rollout.fake_sglang import FOLDER, KEY, FakeSGLang, running
from tests.unit.rollout.tiny_qwen import NoSegments
from tests.unit.rollout.weights import mini_weights

RANKS = 2


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(image_token_id=498)) for _ in range(2)]


def gathered(misnamed: str | None) -> Iterator[tuple[str, Tensor]]:
    """An export: every tensor takes a collective of all ranks."""
    for name, tensor in mini_weights(2.0):
        dist.all_reduce(torch.zeros(1))
        yield name if name != misnamed else "a.wrong.name", tensor


def two_updates(world: World, urls: Sequence[str], spool: str) -> tuple[str, int | None, int, list[int]]:
    """A good update, one that the main rank refuses early, and sampling after it."""
    engine = SGLangRollout(
        FOLDER, NoSegments(), urls=urls, api_key=KEY, end_token_ids=[488], spool=Path(spool) / str(world.rank)
    )
    shared = SharedRollout(engine, world)
    shared.update_weights(gathered(None), 1)
    message = ""
    try:
        shared.update_weights(gathered(next(mini_weights())[0]), 2)
    except WeightSyncError as error:
        message = str(error)
    groups = shared.generate([Prompt(str(world.rank), (5, 6), (), "")], 3, Sampling(max_new_tokens=4), seed=0, step=0)
    version = shared.policy_version
    shared.close()
    return message, version, len(groups[0]), [rollout.policy_version for rollout in groups[0]]


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(RANKS, timeout_s=120.0) as gloo:
        yield gloo


def test_ranks_agree_on_what_the_servers_hold(gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path) -> None:
    for rank in range(RANKS):
        (tmp_path / str(rank)).mkdir()
    for message, version, count, versions in gloo.run(two_updates, [fake.url for fake in fakes], str(tmp_path)):
        assert "no weight 'a.wrong.name'" in message
        assert version == 1 and count == 3 and versions == [1, 1, 1]
    for fake in fakes:
        assert fake.paths().count("/begin_weight_update") == 1, "only the main rank hands weights over"
        assert fake.version == "1"


def serve_checkpoint(world: World, checkpoint: Path, urls: Sequence[str], output: Path) -> tuple[list[str], int]:
    """Names in the folder that servers are given, and the version after the first hand-over."""
    os.environ[API_KEY] = KEY
    companions = files_folder(checkpoint, "policy")
    policy = build_policy(
        checkpoint,
        Qwen3VLShape.from_folder(companions),
        world=world,
        dtype=torch.float32,
        optimizer=OptimizerConfig(),
        total_steps=1,
    )
    config = parse(["--rollout", "sglang", "--rollout-urls", *urls, "--output", str(output)])
    shared = build_served_rollout(config, checkpoint, policy, Renderer.from_folder(companions), world=world)
    names = HFFolder(output / "rollout" / "model").names()
    shared.update_weights(policy.export_hf(), 4)
    version = shared.policy_version
    shared.close()
    assert version is not None
    return list(names), version


def test_a_checkpoint_is_served_as_a_folder_of_its_policy(
    gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Oracle: the folder that the checkpoint was converted from. The folder goes when the run ends."""
    checkpoint = tmp_path / "checkpoint"
    to_megatron(ToMegatronConfig(hf=str(FOLDER), save=str(checkpoint)), say=lambda _: None)
    urls = [fake.url for fake in fakes]
    for names, version in gloo.run(serve_checkpoint, checkpoint, urls, tmp_path / "run", parallel=ParallelConfig(tp=2)):
        assert set(names) == {name for name, _ in mini_weights()} and version == 4
    for fake in fakes:
        assert fake.version == "4" and all(torch.equal(fake.weights[name], tensor) for name, tensor in mini_weights())
    assert not list((tmp_path / "run" / "rollout").iterdir())
