"""The controls as a state machine: each rule by itself, and the state through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.errors import GameError
from prism_megatron.game.controls import Controls, Observation, Verdict

GOOD = Observation({"perception": 0.8, "reasoning": 0.9}, {"perception": 1.0, "reasoning": 2.0}, 0.9, True)
NOTHING_VALID = Observation(
    {"perception": None, "reasoning": None}, {"perception": None, "reasoning": None}, 0.0, False
)


def play(game: GameConfig, *outcomes: Observation) -> tuple[Controls, list[Verdict]]:
    controls = Controls(game)
    return controls, [controls.observe(step, outcome) for step, outcome in enumerate(outcomes)]


def test_by_default_both_players_move_in_every_step() -> None:
    """The released schedule: one update each, whatever happens, and no verdict but to go on."""
    controls, verdicts = play(GameConfig(), GOOD, NOTHING_VALID, GOOD)
    assert set(verdicts) == {"go on"}
    assert all(controls.decide(step).discriminator_updates == 1 for step in range(5))
    assert all(controls.decide(step).update_policy for step in range(5))


def test_update_ratio() -> None:
    """Three discriminator updates a step, the policy in every second step, beginning with the second."""
    controls = Controls(GameConfig(discriminator_updates_per_step=3, policy_update_every=2))
    assert [controls.decide(step).discriminator_updates for step in range(4)] == [3] * 4
    assert [controls.decide(step).update_policy for step in range(4)] == [False, True, False, True]


def test_players_are_frozen_in_ranges_of_steps() -> None:
    """Half-open ranges, several of them, and each player its own."""
    controls = Controls(GameConfig(freeze_policy_steps=(0, 2, 4, 5), freeze_discriminator_steps=(1, 3)))
    assert [controls.decide(step).update_policy for step in range(6)] == [False, False, True, True, False, True]
    assert [controls.decide(step).discriminator_updates for step in range(4)] == [1, 0, 0, 1]


def test_a_player_that_is_frozen_never_moves() -> None:
    """Claim: the controls of ``make effect`` are one player each; the other one goes on."""
    frozen = [Controls(GameConfig(freeze_policy=True)), Controls(GameConfig(freeze_discriminator=True))]
    moves = [
        [(controls.decide(step).update_policy, controls.decide(step).discriminator_updates) for step in range(3)]
        for controls in frozen
    ]
    assert moves == [[(False, 1)] * 3, [(True, 0)] * 3]


def test_the_discriminator_pauses_while_both_towers_are_too_good() -> None:
    """The lower tower decides; a step without pairs changes nothing; below the bound it learns again."""
    controls = Controls(GameConfig(pause_discriminator_above=0.95))
    lower = replace(GOOD, accuracies={"perception": 0.99, "reasoning": 0.9})
    above = replace(GOOD, accuracies={"perception": 0.99, "reasoning": None})
    updates = [controls.decide(0).discriminator_updates]
    for step, outcome in enumerate([lower, above, NOTHING_VALID, lower]):
        controls.observe(step, outcome)
        updates.append(controls.decide(step + 1).discriminator_updates)
    assert updates == [1, 1, 0, 0, 1]


def test_a_figure_at_its_bound_is_within_it() -> None:
    """The pause needs an accuracy above its bound, a collapse a valid share below its own."""
    controls = Controls(GameConfig(pause_discriminator_above=0.8, rollbacks=1, collapse_valid_share=0.9))
    for step in range(9):
        assert controls.observe(step, GOOD) == "go on"
        assert controls.decide(step + 1).discriminator_updates == 1


def test_a_rollback_makes_a_discriminator_of_another_version() -> None:
    """Also where the step itself did not train it: the scores that follow are another discriminator's."""
    still = replace(GOOD, valid_share=0.0, discriminator_updated=False)
    controls, verdicts = play(GameConfig(rollbacks=1, collapse_steps=2), GOOD, still, still)
    assert verdicts[-1] == "roll back"
    assert controls.state.discriminator_version == 3


def test_a_streak_without_valid_rollouts_rolls_back_and_is_then_forgotten() -> None:
    """Two weak steps on end with one good one between do not count; three on end do; the third time raises."""
    game = GameConfig(rollbacks=2, collapse_valid_share=0.5, collapse_steps=2)
    weak = replace(GOOD, valid_share=0.4)
    controls, verdicts = play(game, weak, GOOD, weak, weak, weak, weak, weak)
    assert verdicts == ["go on", "go on", "go on", "roll back", "go on", "roll back", "go on"]
    assert controls.state.rollbacks == 2
    assert controls.state.discriminator_version == 7
    with pytest.raises(GameError, match=r"step 7: 2 steps on end .* no rollback is left \(--rollbacks 2\)"):
        controls.observe(7, weak)


def test_a_number_that_is_not_finite_rolls_back_at_once() -> None:
    """A dropped gradient is a collapse only where rollbacks are allowed; scores that are not finite always are."""
    dropped, broken = replace(GOOD, finite_gradients=False), replace(GOOD, finite_scores=False)
    assert play(GameConfig(), dropped)[1] == ["go on"]
    assert play(GameConfig(rollbacks=1), dropped)[1] == ["roll back"]
    assert play(GameConfig(rollbacks=1), broken)[1] == ["roll back"]
    with pytest.raises(GameError, match="not finite"):
        play(GameConfig(), broken)


def test_the_run_ends_when_every_gap_has_stayed_in_its_band() -> None:
    """A band of 0.5 over three steps: too wide a move, a tower that vanishes or a step without pairs begin anew."""
    game = GameConfig(stop_gap_band=0.5, stop_gap_steps=3)

    def gaps(perception: float, reasoning: float | None) -> Observation:
        return replace(GOOD, reward_gaps={"perception": perception, "reasoning": reasoning})

    outcomes = [gaps(1.0, 2.0), gaps(1.4, 2.0), gaps(1.6, 2.0), gaps(1.5, 2.4)]
    controls, verdicts = play(game, *outcomes)
    assert verdicts == ["go on", "go on", "go on", "stop"]
    assert controls.finished
    for rules, finished in ((GameConfig(), False), (replace(game, stop_gap_band=0.1), False), (game, True)):
        resumed = Controls(rules)
        resumed.restore(controls.to_plain())
        assert resumed.finished == finished, "a run that goes on with a narrower band, or none, is not over"
    assert play(game, *[gaps(1.0, 2.0)] * 2, gaps(1.0, None), gaps(1.0, None))[1] == ["go on"] * 4
    assert play(game, *[gaps(1.0, 2.0)] * 2, NOTHING_VALID, *[gaps(1.0, 2.0)] * 2)[1] == ["go on"] * 5
    assert play(game, *[gaps(1.0, None)] * 3)[1][-1] == "stop"
    joined = play(game, *[gaps(1.0, None)] * 2, *[gaps(1.0, 2.0)] * 3)[1]
    assert joined == ["go on"] * 4 + ["stop"], "a tower that joins begins anew"


outcomes = st.lists(
    st.builds(
        lambda accuracy, gap, share: replace(
            GOOD, accuracies={"perception": accuracy}, reward_gaps={"perception": gap}, valid_share=share
        ),
        st.one_of(st.none(), st.floats(0, 1)),
        st.one_of(st.none(), st.floats(-1, 1)),
        st.floats(0, 1),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(outcomes, st.integers(0, 12))
def test_a_state_through_json_decides_as_one_that_was_never_saved(history: list[Observation], cut: int) -> None:
    """Claim: saved after any step and restored, all later decisions and verdicts are those of an unbroken run."""
    game = GameConfig(pause_discriminator_above=0.5, rollbacks=20, collapse_steps=2, collapse_valid_share=0.5,
                      stop_gap_band=0.7, stop_gap_steps=2)  # fmt: skip

    def run(break_at: int | None) -> list[object]:
        controls, seen = Controls(game), list[object]()
        for step, outcome in enumerate(history):
            if step == break_at:
                saved = json.loads(json.dumps(controls.to_plain()))
                controls = Controls(game)
                controls.restore(saved)
            seen += [controls.decide(step), controls.observe(step, outcome)]
        return seen

    assert run(cut) == run(None)
