"""What a game carries from step to step beside its players' weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.data.loader import Example, ExampleSource
from prism_megatron.game.controls import Controls
from prism_megatron.game.probe_set import ProbeSet
from prism_megatron.game.replay import ReplayBuffer


@dataclass(eq=False)
class GameMemory:
    """The controls' state, the answers to replay and the probe set; every checkpoint keeps all three."""

    controls: Controls
    replay: ReplayBuffer
    probe: ProbeSet | None = None

    @classmethod
    def fresh(cls, game: GameConfig, *, seed: int) -> GameMemory:
        """That of a game before its first step."""
        return cls(Controls(game), ReplayBuffer(game, seed=seed))

    def to_plain(self) -> dict[str, Any]:
        """All of it as JSON."""
        probe = None if self.probe is None else self.probe.to_plain()
        return {"controls": self.controls.to_plain(), "replay": self.replay.to_plain(), "probe": probe}

    def restore(
        self,
        plain: Mapping[str, Any],
        prompts: Callable[[int], Sequence[Example]],
        probe_prompts: ExampleSource | None = None,
    ) -> None:
        """Take back what ``to_plain`` gave; ``prompts(step)`` gives the examples of an earlier step again.

        The probe set is taken back where there are ``probe_prompts``. Raises CheckpointError for other prompts.
        """
        self.controls.restore(plain["controls"])
        self.replay.restore(plain["replay"], prompts)
        if probe_prompts is not None and plain["probe"] is not None:
            self.probe = ProbeSet.of_plain(plain["probe"], probe_prompts)
