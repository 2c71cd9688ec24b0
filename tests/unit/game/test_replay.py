"""What is replayed: bounded, keyed by seed and step, and the same after a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.data.loader import Example
from prism_megatron.errors import CheckpointError
from prism_megatron.game.replay import ReplayBuffer
from prism_megatron.types import PreferenceGroup, Prompt, Response, Segments, Span

GAME = GameConfig(replay_prompts=2, replay_steps=3)
WHOLE, CUT = Segments(Span(0, 1), Span(1, 2), None), Segments(None, None, "cut off")


def prompts(step: int) -> list[Example]:
    return [
        Example(
            Prompt(id=f"{step}/{p}", token_ids=(step, p), images=(), question=""),
            Response((9, 9, p), Segments(Span(0, 2), None, None)),
        )
        for p in range(3)
    ]


def played(step: int) -> list[PreferenceGroup]:
    """Three groups of two answers, of which the second one is cut off; in the middle group both are."""
    answers = [(Response((step, p, 7), WHOLE if p != 1 else CUT), Response((1,), CUT)) for p in range(3)]
    return [
        PreferenceGroup(example.prompt, example.reference, own)
        for example, own in zip(prompts(step), answers, strict=True)
    ]


def seen(groups: Sequence[PreferenceGroup]) -> list[Any]:
    return [(g.prompt.id, g.reference, g.rollouts) for g in groups]


def test_only_valid_answers_of_the_last_steps_come_back() -> None:
    """After five steps every draw is two different groups of the last three, none without a valid answer."""
    buffer = ReplayBuffer(GAME, seed=1)
    assert buffer.draw(0) == []
    for step in range(5):
        buffer.add(step, played(step))
    drawn = [buffer.draw(step) for step in range(5, 40)]
    ids = [[group.prompt.id for group in groups] for groups in drawn]
    assert all(len(set(own)) == 2 for own in ids)
    assert {one for own in ids for one in own} == {f"{step}/{p}" for step in (2, 3, 4) for p in (0, 2)}
    assert all(len(group.rollouts) == 1 and group.rollouts[0].segments.valid for groups in drawn for group in groups)
    assert seen(buffer.draw(7)) == seen(buffer.draw(7)), "a draw is a function of seed and step"
    other = ReplayBuffer(GAME, seed=2)
    for step in (2, 3, 4):
        other.add(step, played(step))
    assert [seen(other.draw(step)) for step in range(5, 40)] != [seen(groups) for groups in drawn]


def test_nothing_is_kept_where_nothing_is_replayed() -> None:
    buffer = ReplayBuffer(GameConfig(), seed=1)
    buffer.add(0, played(0))
    assert buffer.to_plain() == []
    assert buffer.draw(1) == []


def test_a_restored_buffer_draws_what_the_saved_one_would() -> None:
    """Claim: through JSON, with prompts made again, all later draws are the same; so is what it forgets."""
    buffer, restored = ReplayBuffer(GAME, seed=1), ReplayBuffer(GAME, seed=1)
    for step in range(4):
        buffer.add(step, played(step))
    restored.restore(json.loads(json.dumps(buffer.to_plain())), prompts)
    for step in range(4, 8):
        assert seen(restored.draw(step)) == seen(buffer.draw(step))
        for one in (buffer, restored):
            one.add(step, played(step))


def test_what_a_buffer_held_is_gone_once_it_is_restored() -> None:
    """Claim: after a rollback only answers from before the checkpoint are replayed."""
    buffer, saved = ReplayBuffer(GAME, seed=1), ReplayBuffer(GAME, seed=1)
    for step in (5, 6):
        buffer.add(step, played(step))
    saved.add(0, played(0))
    buffer.restore(saved.to_plain(), prompts)
    assert buffer.to_plain() == saved.to_plain()


def test_answers_are_not_put_to_other_prompts() -> None:
    """Claim: a run that goes on with other data, or fewer prompts a step, ends instead of training on wrong pairs."""
    buffer = ReplayBuffer(GAME, seed=1)
    buffer.add(0, played(0))
    plain = json.loads(json.dumps(buffer.to_plain()))
    for others in (lambda step: prompts(step + 1), lambda step: prompts(step)[:2]):
        with pytest.raises(CheckpointError, match=r"answers to prompt '0/[02]'.*--prompts-per-step"):
            ReplayBuffer(GAME, seed=1).restore(plain, others)
