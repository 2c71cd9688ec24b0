"""The probe of servers on one rank: which example it is, when it asks, and what it finds wrong.

Oracle of right scores: transformers. Blind to real servers and to stages, for which ``tests/distributed`` is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.errors import WeightSyncError
from prism_megatron.sampling.probe import ServingProbe
from prism_megatron.training.roles import batch_format, build_policy
from prism_megatron.types import Prompt, Response, Rollout, Segments, VersionSpan
from tests.unit.rollout.oracle import forced_logprobs
from tests.unit.rollout.tiny_qwen import image

FOLDER = MINI_FOLDER / "policy"
SHAPE = Qwen3VLShape.from_folder(FOLDER)
PAD = 498
BOUND = 1e-3


def example(name: str, token_ids: tuple[int, ...], answer: tuple[int, ...], *, pictured: bool) -> Example:
    images = (image(0, 4, 4),) if pictured else ()
    return Example(Prompt(name, token_ids, images, ""), Response(answer, Segments(None, None, "not judged")))


TEXT = example("text", (5, 6, 7), (30, 31), pictured=False)
PICTURE = example("picture", (5, 496, *[PAD] * 4, 497, 8), (40, 41, 42, 43), pictured=True)
LATER = example("later", (9, 496, *[PAD] * 4, 497, 8), (50, 51), pictured=True)


class Servers:
    """They score as they are told to, and note what they were asked."""

    def __init__(self, **scores: Sequence[float]) -> None:
        self.scores = scores
        self.took_back = 0
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def score(self, prompt: Prompt, response: Sequence[int]) -> dict[str, tuple[float, ...]]:
        self.asked.append((prompt.id, tuple(response)))
        return {url: tuple(scores) for url, scores in self.scores.items()}


@pytest.fixture(scope="module")
def policy(world: World) -> MegatronEngine:
    return build_policy(FOLDER, SHAPE, world=world, dtype=torch.float32, optimizer=OptimizerConfig(), total_steps=1)


def right_scores(one: Example) -> list[float]:
    oracle = Qwen3VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = one.reference.token_ids
    answer = Rollout(ids, (0.0,) * len(ids), "stop", (VersionSpan(0, 0, len(ids)),), one.reference.segments)
    return [float(logprob) for logprob in forced_logprobs(oracle, one.prompt, answer, 1.0)]


def probe_of(examples: Sequence[Example], world: World, *, every: int = 5) -> ServingProbe:
    form = batch_format(Renderer.from_folder(FOLDER), world)
    return ServingProbe(examples, every=every, bound=BOUND, form=form, world=world)


def test_it_asks_when_it_is_due_about_the_first_example_with_an_image(world: World, policy: MegatronEngine) -> None:
    """The first version at all, and then the first that is ``every`` or more after the last one asked about."""
    servers = Servers(one=right_scores(PICTURE))
    probe = probe_of([TEXT, PICTURE, LATER], world)
    asked_at = []
    for version in (2, 3, 6, 7, 8, 11, 13, 16, 17, 30, 34, 35):
        before = len(servers.asked)
        probe.check(servers, policy, version)
        asked_at += [version] * (len(servers.asked) - before)
    assert asked_at == [2, 7, 13, 30, 35]
    assert set(servers.asked) == {("picture", (40, 41, 42, 43))}


def test_a_server_that_came_back_is_asked_at_the_next_version(world: World, policy: MegatronEngine) -> None:
    """And once: the probe is not due again because of it."""
    servers = Servers(one=right_scores(TEXT))
    probe = probe_of([TEXT], world)
    asked_at = []
    for version, took_back in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 1), (7, 1)):
        before, servers.took_back = len(servers.asked), took_back
        probe.check(servers, policy, version)
        asked_at += [version] * (len(servers.asked) - before)
    assert asked_at == [0, 2, 7]


def test_one_row_is_run_however_many_servers_there_are(
    world: World, policy: MegatronEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: what the trainer's pass holds does not grow with them; each of sixteen is compared all the same."""
    seen: list[Batch] = []

    def watched(batches: Sequence[Batch], *more: Any) -> Any:
        seen.extend(batches)
        return MegatronEngine.token_values(policy, batches, *more)

    monkeypatch.setattr(policy, "token_values", watched)
    right = right_scores(PICTURE)
    servers = Servers(**{f"server{i}": right for i in range(16)})
    probe_of([PICTURE], world).check(servers, policy, 0)
    (batch,) = seen
    num_tokens = len(PICTURE.prompt.token_ids) + len(PICTURE.reference.token_ids)
    assert batch.input_ids_B_S.shape[0] == 1 and batch.input_ids_B_S.shape[1] < 2 * num_tokens
    servers.scores["server15"] = [score - 2 * BOUND for score in right]
    with pytest.raises(WeightSyncError, match=r"^server15 gives the probe"):
        probe_of([PICTURE], world).check(servers, policy, 0)


def test_without_an_image_it_is_the_first_example(world: World, policy: MegatronEngine) -> None:
    servers = Servers(one=right_scores(TEXT))
    probe_of([TEXT, TEXT], world).check(servers, policy, 0)
    assert servers.asked == [("text", (30, 31))]


@pytest.mark.parametrize(
    "changes",
    [
        (1.5 * BOUND,) * 4,
        (-1.5 * BOUND,) * 4,
        (1.5 * BOUND, -1.5 * BOUND) * 2,
        (0.0, 0.0, 0.0, 6 * BOUND),
        (0.0, math.nan, 0.0, 0.0),
        (-math.inf, 0.0, 0.0, 0.0),
    ],
    ids=str,
)
def test_a_server_that_scores_otherwise_is_named(
    changes: tuple[float, ...], world: World, policy: MegatronEngine
) -> None:
    """Too high or too low, in one token or in all, or no number: by the mean absolute difference a token."""
    right = right_scores(PICTURE)
    wrong = [score + change for score, change in zip(right, changes, strict=True)]
    with pytest.raises(WeightSyncError, match=r"^two gives the probe 'picture' other log-probs .* at version 3"):
        probe_of([PICTURE], world).check(Servers(one=right, two=wrong, three=right), policy, 3)


def test_the_mean_over_the_answers_tokens_decides(world: World, policy: MegatronEngine) -> None:
    """One token of four is off by three times the bound, which passes, or by eight times, which is told."""
    right = right_scores(PICTURE)
    for factor in (3, 8):
        scores = [right[0], right[1] + factor * BOUND, *right[2:]]
        probe = probe_of([PICTURE], world)
        if factor == 3:
            probe.check(Servers(one=scores), policy, 0)
            continue
        with pytest.raises(WeightSyncError, match=r"differ by 0\.002 a token \(largest 0\.008\)"):
            probe.check(Servers(one=scores), policy, 0)
