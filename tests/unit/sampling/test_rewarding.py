"""What of a rollout is checked, and against what."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.rewards.rewarder import Rewarded, Sampled
from prism_megatron.sampling.rewarding import gold_of, reward
from prism_megatron.types import Rollout, VersionSpan
from tests.unit.stages.tiny_rewards import NOT_JUDGED, example


class Listener:
    """A rewarder that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Sampled] = []

    def submit(self, group: Sequence[Sampled]) -> Future[list[Rewarded]]:
        self.asked += group
        return Future()


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.from_folder(MINI_FOLDER / "policy")


def rollout(token_ids: Sequence[int]) -> Rollout:
    count = len(token_ids)
    return Rollout(tuple(token_ids), (0.0,) * count, "stop", (VersionSpan(0, 0, count),), NOT_JUDGED)


def test_what_is_checked_is_the_text_before_the_end_token(renderer: Renderer) -> None:
    scene = SceneSource(renderer, split="heldout", seed=0, batch_size=1).batch(0)[0]
    listener: Any = Listener()
    whole = scene.reference.token_ids
    reward(listener, renderer, scene, [rollout(whole), rollout(whole[:-1])])
    ended, cut = listener.asked
    assert ended.response == cut.response == renderer.decode(whole[:-1])
    assert (ended.ended, cut.ended) == (True, False)
    assert scene.scene is not None and ended.gold == scene.scene.answer
    assert (ended.id, ended.question) == (scene.prompt.id, scene.prompt.question)


def test_a_record_says_what_kind_of_answer_it_has() -> None:
    assert gold_of(example("q")) == ("3", "integer")
