"""A trial is drawn from its seed alone, and everything that can befall a run is drawn in time."""

from __future__ import annotations

from collections import Counter

from tests.faults.draw import FAULTS, ROLES, SAVING, SERVED, STAGES, draw

TRIALS = [draw(f"3-{number}", may_mount=True) for number in range(2000)]


def test_a_seed_is_a_trial() -> None:
    assert draw("3-7", may_mount=True) == TRIALS[7] != draw("4-7", may_mount=True)
    assert TRIALS[7].to_plain()["seed"] == "3-7"


def test_everything_is_drawn() -> None:
    """Claim: every stage, fault, launcher and role that is looked for first; each stage that can have servers with
    them, on one rank and on two."""
    assert {trial.setting.stage for trial in TRIALS} == set(STAGES)
    assert {trial.fault for trial in TRIALS} == set(FAULTS)
    assert {trial.roles[0] for trial in TRIALS} == set(ROLES)
    assert all(sorted(trial.roles) == sorted(ROLES) for trial in TRIALS)
    settings = Counter(trial.setting for trial in TRIALS)
    assert {(one.stage, one.ranks) for one in settings if one.rollout == "served"} == {
        (stage, ranks) for stage in SERVED for ranks in (1, 2)
    }
    assert {trial.torchrun for trial in TRIALS if trial.setting.ranks == 2} == {True, False}
    assert not any(trial.torchrun for trial in TRIALS if trial.setting.ranks == 1)
    assert all(0 <= share < 1 for trial in TRIALS for share in (trial.place, trial.delay, trial.member, trial.choice))


def test_a_fault_is_drawn_where_it_can_come() -> None:
    """Claim: only stages with checkpoints lose bytes of one, and without a disk to fill none is filled."""
    assert {trial.setting.stage for trial in TRIALS if trial.fault == "damage"} == set(SAVING)
    poor = [draw(trial.seed, may_mount=False) for trial in TRIALS]
    assert not any(trial.fault == "disk" for trial in poor)
    assert all(mine == theirs for mine, theirs in zip(poor, TRIALS, strict=True) if theirs.fault != "disk")
