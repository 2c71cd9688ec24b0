"""Checks of the game's rules that need nothing but themselves."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.errors import ConfigError


def check_game(game: GameConfig) -> None:
    """Raise ConfigError for rules that contradict each other, or that nothing would use."""
    if game.advantage == "joint" and game.credit == "segment":
        raise ConfigError(
            "--credit segment gives every segment its own tower's advantage, and --advantage joint has one advantage "
            "only; use --credit response or --advantage per_expert"
        )
    if game.length_scores and game.shuffle_scores:
        raise ConfigError("--length-scores takes no scores that --shuffle-scores could shuffle; leave one of them out")
    _check_steps("--freeze-policy-steps", game.freeze_policy_steps)
    _check_steps("--freeze-discriminator-steps", game.freeze_discriminator_steps)
    _check_used(game)


def _check_steps(flag: str, bounds: Sequence[int]) -> None:
    if len(bounds) % 2 or list(bounds) != sorted(set(bounds)) or any(bound < 0 for bound in bounds):
        raise ConfigError(
            f"{flag} {' '.join(map(str, bounds))} must be pairs of a first step and the first step after, in rising "
            "order, such as 0 20"
        )


def _check_used(game: GameConfig) -> None:
    """A flag that tunes what is off is a mistake."""
    default = GameConfig()
    tuned = {
        "replay_steps": ("--replay-prompts", game.replay_prompts > 0),
        "collapse_valid_share": ("--rollbacks", game.rollbacks > 0),
        "collapse_steps": ("--rollbacks", game.rollbacks > 0),
        "stop_gap_steps": ("--stop-gap-band", game.stop_gap_band is not None),
    }
    for name, (flag, on) in tuned.items():
        if not on and getattr(game, name) != getattr(default, name):
            raise ConfigError(f"--{name.replace('_', '-')} needs {flag}")
    if game.freeze_discriminator:
        for name in ("discriminator_updates_per_step", "replay_prompts", "pause_discriminator_above"):
            if getattr(game, name) != getattr(default, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is nothing to a discriminator under --freeze-discriminator"
                )
