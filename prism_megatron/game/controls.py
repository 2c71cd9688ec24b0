"""Who moves in a step, and when the game goes back or ends: rules over what the steps before came to.

Pure: a step's decision follows from the rules, the state and the step's number, and the state is part of every
checkpoint, so a run that goes on decides as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.errors import GameError

Verdict = Literal["go on", "roll back", "stop"]


@dataclass(frozen=True)
class Decision:
    """Who moves in one step."""

    discriminator_updates: int
    update_policy: bool


@dataclass(frozen=True)
class Observation:
    """What the rules look at after a step. Figures by tower are None, or missing, where a tower had no pairs."""

    accuracies: Mapping[str, float | None]
    reward_gaps: Mapping[str, float | None]
    valid_share: float
    discriminator_updated: bool
    finite_scores: bool = True
    finite_gradients: bool = True


@dataclass(frozen=True)
class GameState:
    """What the rules remember. ``discriminator_version`` is the number of steps played when it last changed."""

    discriminator_version: int = 0
    accuracy: float | None = None
    """the lower accuracy of both towers, in the last step with pairs"""
    reward_gaps: Sequence[Mapping[str, float]] = ()
    """by tower, of the last steps on end with pairs"""
    weak_steps: int = 0
    """steps on end with too few valid rollouts, up to now"""
    rollbacks: int = 0
    settled: bool = False


class Controls:
    """The rules of a run and their state."""

    def __init__(self, game: GameConfig) -> None:
        self._game = game
        self.state = GameState()

    def decide(self, step: int) -> Decision:
        """Who moves in ``step``."""
        game, accuracy = self._game, self.state.accuracy
        bound = game.pause_discriminator_above
        paused = bound is not None and accuracy is not None and accuracy > bound
        discriminator_rests = game.freeze_discriminator or _within(step, game.freeze_discriminator_steps) or paused
        policy_rests = game.freeze_policy or _within(step, game.freeze_policy_steps)
        return Decision(
            discriminator_updates=0 if discriminator_rests else game.discriminator_updates_per_step,
            update_policy=not policy_rests and (step + 1) % game.policy_update_every == 0,
        )

    def observe(self, step: int, seen: Observation) -> Verdict:
        """Take in what ``step`` came to. "roll back" asks for both players of the last good checkpoint.

        Raises GameError for a collapse when no rollback is left, and for scores that are not finite.
        """
        game, state = self._game, self.state
        accuracies = [value for value in seen.accuracies.values() if value is not None]
        gaps = {tower: gap for tower, gap in seen.reward_gaps.items() if gap is not None}
        weak = game.rollbacks > 0 and seen.valid_share < game.collapse_valid_share
        self.state = replace(
            state,
            discriminator_version=step + 1 if seen.discriminator_updated else state.discriminator_version,
            accuracy=min(accuracies, default=state.accuracy),
            reward_gaps=[*state.reward_gaps, gaps][-game.stop_gap_steps :] if gaps else (),
            weak_steps=state.weak_steps + 1 if weak else 0,
        )
        trouble = self._trouble(seen)
        if trouble is not None:
            self._count_rollback(step, trouble)
            return "roll back"
        self.state = replace(self.state, settled=self._has_settled())
        return "stop" if self.state.settled else "go on"

    @property
    def finished(self) -> bool:
        """Whether the rule that ends the run has been met, and still holds."""
        return self.state.settled and self._has_settled()

    def to_plain(self) -> dict[str, Any]:
        """The state as JSON."""
        return asdict(self.state)

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Take back what ``to_plain`` gave."""
        self.state = GameState(**plain)

    def _trouble(self, seen: Observation) -> str | None:
        if not seen.finite_scores:
            return "the discriminator's scores are not finite"
        if self._game.rollbacks and not seen.finite_gradients:
            return "a gradient is not finite"
        if self._game.rollbacks and self.state.weak_steps >= self._game.collapse_steps:
            return (
                f"{self.state.weak_steps} steps on end had less than {self._game.collapse_valid_share:g} valid "
                "rollouts (--collapse-valid-share)"
            )
        return None

    def _count_rollback(self, step: int, trouble: str) -> None:
        """Both players will be other ones: what was seen of these no longer counts."""
        if self.state.rollbacks >= self._game.rollbacks:
            raise GameError(
                f"step {step}: {trouble}, and no rollback is left (--rollbacks {self._game.rollbacks}); lower "
                "--policy.lr or --discriminator.lr, or allow more rollbacks"
            )
        self.state = GameState(discriminator_version=step + 1, rollbacks=self.state.rollbacks + 1)

    def _has_settled(self) -> bool:
        band, seen = self._game.stop_gap_band, self.state.reward_gaps
        if band is None or len(seen) < self._game.stop_gap_steps:
            return False
        if any(gaps.keys() != seen[0].keys() for gaps in seen):
            return False
        return all(max(gaps[tower] for gaps in seen) - min(gaps[tower] for gaps in seen) <= band for tower in seen[0])


def _within(step: int, bounds: Sequence[int]) -> bool:
    """Whether ``step`` lies in one of the half-open ranges ``bounds[0]:bounds[1]``, ``bounds[2]:bounds[3]``, …"""
    return any(first <= step < end for first, end in zip(bounds[::2], bounds[1::2], strict=True))
