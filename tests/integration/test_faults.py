"""Trials of the fault campaign against the real tools, by fixed seeds; ``make faults`` draws as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.draw import draw

ONE = "2-0"
"""Cheap, and the command is really started again."""
HANDFUL = ("1-135", "1-207", "1-276", "1-329", "2-24")
"""Of reinforcement: a reward worker is lost, a checkpoint cut, a server lost, a disk filled, a clock put off."""


@pytest.mark.long
def test_one_trial_passes(tmp_path: Path) -> None:
    """Claim: what a drawn fault leaves is what a run that was left alone comes to, in one stage."""
    check(tmp_path, ONE)


@pytest.mark.long
@pytest.mark.slow
def test_a_handful_of_trials_pass(tmp_path: Path) -> None:
    """Claim: of the kinds of fault one each is survived, with a server and without."""
    assert [draw(seed, may_mount=True).fault for seed in HANDFUL] == ["kill", "damage", "kill", "disk", "clock"]
    check(tmp_path, *HANDFUL)


def check(folder: Path, *seeds: str) -> None:
    campaign = Campaign(folder, None)
    outcomes = [campaign.play(seed) for seed in seeds]
    assert [line for outcome in outcomes for line in outcome.complaints] == []
    assert all(outcome.struck for outcome in outcomes)
