"""Samples split over ranks: the same draws whatever the split, and every rank at work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.sampling.replicas import NoReplica
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.testing import GlooWorld, RankError
from prism_megatron.types import Response, Rollout, Segments
from tests.unit.rollout.tiny_qwen import END, NoSegments, prompt, tiny_model

NUM_SAMPLES = 5
SAMPLING = Sampling(temperature=0.8, max_new_tokens=20)


class CountingRollout(EmbeddedRollout):
    """Counts what this rank draws."""

    num_drawn = 0

    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        drawn = super().generate(request)
        self.num_drawn += sum(map(len, drawn))
        return drawn


def rank_samples(world: World, folder: Path, versions: tuple[int | None, ...]) -> tuple[list[list[Any]], int]:
    """Tokens and log-probs of all groups, and how many samples this rank drew. Version None: no replica."""
    version = versions[world.rank]
    weights = iter(tiny_model(folder / str(world.rank)).state_dict().items())
    rollout: CountingRollout | NoReplica = NoReplica()
    if version is not None:
        rollout = CountingRollout(folder, NoSegments(), end_token_ids=[END], device=torch.device("cpu"))
    rollout.update_weights(weights, version or 0)
    assert next(weights, None) is None, "a tensor left behind would leave the other ranks waiting in its gather"
    reference = Response((END,), Segments(None, None, "not judged"))
    examples = [Example(one, reference) for one in (prompt(1), prompt(2, (4, 4)))]
    groups = sample_groups(rollout, examples, SAMPLING, n=NUM_SAMPLES, seed=3, step=2, world=world)
    return [[(r.token_ids, r.logprobs) for r in group.rollouts] for group in groups], getattr(rollout, "num_drawn", 0)


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def test_every_split_draws_the_same_and_no_rank_idles(gloo: GlooWorld, tmp_path: Path) -> None:
    """Two prompts over one rank, over three, and over the two of four that have weights."""
    tiny_model(tmp_path)
    ((whole, _),) = gloo.run(rank_samples, tmp_path, (0,), num_ranks=1)
    assert len({tokens for group in whole for tokens, _ in group}) == 2 * NUM_SAMPLES, "blind: samples must differ"
    for versions, expected in (((0,) * 3, [4, 3, 3]), ((None, 0, None, 0), [0, 5, 0, 5])):
        found = gloo.run(rank_samples, tmp_path, versions, num_ranks=len(versions))
        assert [drawn for _, drawn in found] == expected
        for groups, _ in found:
            for group, wanted in zip(groups, whole, strict=True):
                assert [tokens for tokens, _ in group] == [tokens for tokens, _ in wanted]
                for (_, logprobs), (_, others) in zip(group, wanted, strict=True):
                    assert logprobs == pytest.approx(others, abs=1e-5)


def test_ranks_of_different_versions_are_refused(gloo: GlooWorld, tmp_path: Path) -> None:
    tiny_model(tmp_path)
    with pytest.raises(RankError, match=r"hold versions \[4, 5\]"):
        gloo.run(rank_samples, tmp_path, (4, 5), num_ranks=2)
