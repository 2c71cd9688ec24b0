"""Rules of the game that contradict each other, or that nothing would use, are refused in one line."""

from __future__ import annotations

import pytest

from prism_megatron.commands.align import parse
from prism_megatron.config.fields import check_fields
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.stages.validate_game import check_game
from prism_megatron.errors import ConfigError


def check(game: GameConfig) -> None:
    check_fields(game)
    check_game(game)


@pytest.mark.parametrize(
    ("game", "complaint"),
    [
        (GameConfig(advantage="joint", credit="segment"), "--credit segment .* use --credit response"),
        (GameConfig(discriminator_updates_per_step=0), "--discriminator-updates-per-step 0 must be at least 1"),
        (GameConfig(policy_update_every=0), "--policy-update-every 0 must be at least 1"),
        (GameConfig(replay_prompts=-1), "--replay-prompts -1 must be at least 0"),
        (GameConfig(pause_discriminator_above=1.0), "--pause-discriminator-above 1 must be at least 0 and below 1"),
        (GameConfig(pause_discriminator_above=float("nan")), "--pause-discriminator-above nan"),
        (GameConfig(rollbacks=1, collapse_valid_share=0.0), "--collapse-valid-share 0 must be above 0"),
        (GameConfig(stop_gap_band=0.0), "--stop-gap-band 0 must be above 0"),
        (GameConfig(stop_gap_band=float("nan")), "--stop-gap-band nan must be above 0"),
        (GameConfig(stop_gap_band=1.0, stop_gap_steps=1), "--stop-gap-steps 1 must be at least 2"),
        (GameConfig(freeze_policy_steps=(3,)), "--freeze-policy-steps 3 must be pairs"),
        (GameConfig(freeze_discriminator_steps=(5, 2)), "--freeze-discriminator-steps 5 2 must be pairs .* rising"),
        (GameConfig(freeze_policy_steps=(0, 2, 2, 4)), "--freeze-policy-steps 0 2 2 4 must be pairs .* rising"),
        (GameConfig(freeze_policy_steps=(0, 9, 4, 12)), "--freeze-policy-steps 0 9 4 12 must be pairs .* rising"),
        (GameConfig(freeze_discriminator_steps=(-1, 2)), "--freeze-discriminator-steps -1 2 must be pairs"),
        (GameConfig(replay_steps=3), "--replay-steps needs --replay-prompts"),
        (GameConfig(collapse_steps=3), "--collapse-steps needs --rollbacks"),
        (GameConfig(stop_gap_steps=3), "--stop-gap-steps needs --stop-gap-band"),
        (GameConfig(freeze_discriminator=True, replay_prompts=2), "--replay-prompts .* --freeze-discriminator"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused(game: GameConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check(game)


def test_rules_at_their_bounds_are_kept() -> None:
    """The least and the most that each rule takes, and steps frozen from the very first on."""
    check(GameConfig())
    check(
        GameConfig(replay_prompts=1, replay_steps=1, rollbacks=1, collapse_steps=1, collapse_valid_share=1.0,
                   stop_gap_band=1e-9, stop_gap_steps=2, pause_discriminator_above=0.0, freeze_policy_steps=(0, 1),
                   freeze_discriminator_steps=(0, 1, 2, 3))
    )  # fmt: skip
    check(GameConfig(advantage="joint", credit="response"))
    check(GameConfig(freeze_discriminator=True, freeze_policy_steps=(0, 20)))


def test_the_default_penalty_follows_the_form() -> None:
    """1.5 as released per expert, none in the paper's joint form, and what is asked for in both."""
    assert (GameConfig().penalty, GameConfig(advantage="joint").penalty) == (1.5, 0.0)
    assert GameConfig(advantage="joint", format_penalty=0.5).penalty == 0.5


def test_every_rule_is_a_flag() -> None:
    """The command line reads ranges, counts and bounds into the game's rules."""
    flags = (
        "--advantage joint --all-invalid-group release --freeze-policy-steps 0 2 5 9 "
        "--discriminator-updates-per-step 3 --policy-update-every 2 --pause-discriminator-above 0.9 "
        "--replay-prompts 4 --replay-steps 3 --rollbacks 2 --collapse-valid-share 0.2 --collapse-steps 3 "
        "--stop-gap-band 0.5 --stop-gap-steps 9 --probe-every 5"
    )
    assert parse(flags.split()).game == GameConfig(
        advantage="joint", all_invalid_group="release", freeze_policy_steps=(0, 2, 5, 9),
        discriminator_updates_per_step=3, policy_update_every=2, pause_discriminator_above=0.9, replay_prompts=4,
        replay_steps=3, rollbacks=2, collapse_valid_share=0.2, collapse_steps=3, stop_gap_band=0.5, stop_gap_steps=9,
        probe_every=5,
    )  # fmt: skip
