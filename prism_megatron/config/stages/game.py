"""Rules of the game between policy and discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARE, ZERO_IS_OFF, OnResume, Range

RELEASED_FORMAT_PENALTY = 1.5


@dataclass(frozen=True)
class GameConfig:
    """From scores to advantages and losses, who moves when, and the switches of control experiments.

    Steps are numbered from 0, as in ``metrics.jsonl``.
    """

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    advantage: Literal["per_expert", "joint"] = "per_expert"
    """per_expert: normalise each tower's scores in the group, then mix; joint: mix the scores, then normalise"""
    alpha: Annotated[float, SHARE] = 0.5
    """weight of perception in the mixed advantage or reward; reasoning has 1 - alpha"""
    score_clip: Annotated[float, POSITIVE] = 10.0
    """scores are clipped to plus or minus this before they are normalised"""
    score_regulariser: Annotated[float, NOT_NEGATIVE] = 0.001
    """weight of the mean squared, unclipped score in the discriminator's loss"""
    format_penalty: Annotated[float | None, NOT_NEGATIVE] = None
    """taken from the advantage of a rollout that breaks the format; by default 1.5 with per_expert, 0 with joint"""
    all_invalid_group: Literal["zero", "release"] = "zero"
    """a group without a valid rollout gets advantage 0, or as released minus the format penalty on every rollout"""
    credit: Literal["response", "segment"] = "response"
    """response: the mixed advantage on every token; segment: each segment's tokens get their own tower's"""
    freeze_policy: bool = False
    """control: the policy is never updated"""
    freeze_discriminator: bool = False
    """control: the discriminator is never updated"""
    shuffle_scores: bool = False
    """control: scores are permuted among the rollouts of each group"""
    length_scores: bool = False
    """control: in place of the discriminator's scores, how long a segment is beside the longest of its group"""
    freeze_policy_steps: tuple[int, ...] = ()
    """steps in which the policy is not updated, as pairs: first step, first step after (0 20: steps 0 to 19)"""
    freeze_discriminator_steps: tuple[int, ...] = ()
    """the same for the discriminator"""
    discriminator_updates_per_step: Annotated[int, AT_LEAST_ONE] = 1
    """updates of the discriminator on a step's pairs; scores are those before the first"""
    policy_update_every: Annotated[int, AT_LEAST_ONE] = 1
    """the policy is updated in one step of so many only, the last of them"""
    pause_discriminator_above: Annotated[float | None, Range(at_least=0, below=1)] = None
    """leave the discriminator as it is while both towers ranked more than this share of the last step's pairs right"""
    replay_prompts: Annotated[int, ZERO_IS_OFF] = 0
    """prompts of earlier steps, with their rollouts, among a step's pairs for the discriminator; 0 for none"""
    replay_steps: Annotated[int, AT_LEAST_ONE] = 10
    """how many steps back the replayed prompts may come from"""
    rollbacks: Annotated[int, ZERO_IS_OFF] = 0
    """times that both players may go back to the last good checkpoint, after which a collapse ends the run; 0: off"""
    collapse_valid_share: Annotated[float, Range(above=0, at_most=1)] = 0.1
    """a collapse is a smaller share of valid rollouts than this, in --collapse-steps steps on end, or a number that is
    not finite"""
    collapse_steps: Annotated[int, AT_LEAST_ONE] = 5
    """steps on end with too few valid rollouts that make a collapse"""
    stop_gap_band: Annotated[float | None, POSITIVE] = None
    """end the run once every tower's reward gap has stayed within a band this wide for --stop-gap-steps steps"""
    stop_gap_steps: Annotated[int, Range(at_least=2, remark=": one gap is always within a band")] = 20
    """length of that time in steps"""
    probe_every: Annotated[int, ZERO_IS_OFF] = 0
    """steps between scorings of one fixed set of held-out prompts and first rollouts, a step's size; 0 for none"""

    @property
    def penalty(self) -> float:
        """The format penalty in use."""
        if self.format_penalty is not None:
            return self.format_penalty
        return RELEASED_FORMAT_PENALTY if self.advantage == "per_expert" else 0.0
