"""Answers of earlier steps: as more negatives for the discriminator, and as a fixed set to watch it with.

Checkpoints keep their tokens; prompts and references are made again from their source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.data.loader import Example
from prism_megatron.errors import CheckpointError
from prism_megatron.types import PreferenceGroup, Response, Segments, Span

_DRAW = 0x5EED
"""Sets the draws of this module apart from others with the same seed and step."""


class ReplayBuffer:
    """The groups of the last steps that have a valid rollout. Nothing is kept where nothing is replayed."""

    def __init__(self, game: GameConfig, *, seed: int) -> None:
        self._prompts = game.replay_prompts
        self._seed = seed
        self._steps: deque[tuple[int, Sequence[tuple[int, PreferenceGroup]]]] = deque(maxlen=game.replay_steps)

    def draw(self, step: int) -> list[PreferenceGroup]:
        """Groups to replay in ``step``, without repetition: all that are kept, if these are fewer than asked for."""
        kept = [group for _, groups in self._steps for _, group in groups]
        chosen = np.random.default_rng([_DRAW, self._seed, step]).permutation(len(kept))[: self._prompts]
        return [kept[i] for i in sorted(chosen.tolist())]

    def add(self, step: int, groups: Sequence[PreferenceGroup]) -> None:
        """Keep what ``step`` played, and forget the oldest step beyond the bound."""
        if self._prompts:
            self._steps.append(
                (step, [(g, for_judging(group)) for g, group in enumerate(groups) if group.valid_rollouts])
            )

    def to_plain(self) -> list[dict[str, Any]]:
        """Steps, the numbers of their prompts and their answers, as JSON."""
        return [
            {"step": step, "groups": [[g, answers_to_plain(group)] for g, group in groups]}
            for step, groups in self._steps
        ]

    def restore(self, plain: Sequence[Mapping[str, Any]], prompts: Callable[[int], Sequence[Example]]) -> None:
        """Take back what ``to_plain`` gave; ``prompts(step)`` gives the examples of an earlier step again.

        Raises CheckpointError where those are others (see ``group_of``).
        """
        self._steps.clear()
        for entry in plain if self._prompts else ():
            examples = prompts(entry["step"])
            self._steps.append((entry["step"], [(g, group_of(examples, g, kept)) for g, kept in entry["groups"]]))


def for_judging(group: PreferenceGroup) -> PreferenceGroup:
    """The group with its valid answers only, and of these what a discriminator reads."""
    answers = (group.rollouts[r] for r in group.valid_rollouts)
    return PreferenceGroup(
        group.prompt, group.reference, tuple(Response(answer.token_ids, answer.segments) for answer in answers)
    )


def answers_to_plain(group: PreferenceGroup) -> dict[str, Any]:
    """The answers of a group ``for_judging`` as JSON; token ids as one text, so that they take one line of it."""
    answers = [
        {
            "token_ids": " ".join(map(str, answer.token_ids)),
            "perception": answer.segments.perception,
            "reasoning": answer.segments.reasoning,
        }
        for answer in group.rollouts
    ]
    return {"prompt": group.prompt.id, "answers": answers}


def group_of(examples: Sequence[Example], number: int, plain: Mapping[str, Any]) -> PreferenceGroup:
    """The inverse of ``answers_to_plain``, for the group of ``examples[number]``.

    Raises CheckpointError where that is another prompt than the answers are to.
    """
    found = examples[number].prompt.id if number < len(examples) else None
    if found != plain["prompt"]:
        raise CheckpointError(
            f"the checkpoint keeps answers to prompt {plain['prompt']!r}, where this run has {found!r}; go on with the "
            "--data, --prompts-per-step and lengths that it was saved with"
        )
    answers = tuple(
        Response(
            tuple(map(int, kept["token_ids"].split())),
            Segments(_span(kept["perception"]), _span(kept["reasoning"]), None),
        )
        for kept in plain["answers"]
    )
    return PreferenceGroup(examples[number].prompt, examples[number].reference, answers)


def _span(plain: Sequence[int] | None) -> Span | None:
    return None if plain is None else Span(*plain)
