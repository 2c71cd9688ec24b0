"""What a game carries from step to step beside its players' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.config.game import GameConfig
from prism_megatron.data.loader import Example
from prism_megatron.game.controls import Controls
from prism_megatron.game.replay import ReplayBuffer


@dataclass(frozen=True, eq=False)
class GameMemory:
    """The controls' state and the answers to replay; every checkpoint keeps both."""

    controls: Controls
    replay: ReplayBuffer

    @classmethod
    def fresh(cls, game: GameConfig, *, seed: int) -> GameMemory:
        """That of a game before its first step."""
        return cls(Controls(game), ReplayBuffer(game, seed=seed))

    def to_plain(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {"controls": self.controls.to_plain(), "replay": self.replay.to_plain()}

    def restore(self, plain: Mapping[str, Any], prompts: Callable[[int], Sequence[Example]]) -> None:
        """Take back what ``to_plain`` gave; ``prompts(step)`` gives the examples of an earlier step again."""
        self.controls.restore(plain["controls"])
        self.replay.restore(plain["replay"], prompts)
