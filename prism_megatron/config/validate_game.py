"""Checks of the game's rules that need nothing but themselves."""

from __future__ import annotations

from prism_megatron.config.game import GameConfig
from prism_megatron.errors import ConfigError


def check_game(game: GameConfig) -> None:
    """Raise ConfigError for rules that contradict each other, or that nothing would use."""
    if game.advantage == "joint" and game.credit == "segment":
        raise ConfigError(
            "--credit segment gives every segment its own tower's advantage, and --advantage joint has one advantage "
            "only; use --credit response or --advantage per_expert"
        )
