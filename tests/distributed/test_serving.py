"""One set of servers for several ranks: the main rank hands weights over, all ranks sample, and none is left waiting.

The servers are fakes in the test's process; the ranks, their collectives and their HTTP are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.engine.runtime import World
from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.sglang import SGLangRollout
from prism_megatron.stages.serving import SharedRollout
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


def test_ranks_agree_on_what_the_servers_hold(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    for rank in range(RANKS):
        (tmp_path / str(rank)).mkdir()
    with GlooWorld(RANKS, timeout_s=120.0) as gloo:
        for message, version, count, versions in gloo.run(two_updates, [fake.url for fake in fakes], str(tmp_path)):
            assert "no weight 'a.wrong.name'" in message
            assert version == 1 and count == 3 and versions == [1, 1, 1]
    for fake in fakes:
        assert fake.paths().count("/begin_weight_update") == 1, "only the main rank hands weights over"
        assert fake.version == "1"
