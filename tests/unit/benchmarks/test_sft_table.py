"""What ``benchmarks/sft.py`` makes of steps that were timed: rates, ratios, and whether limits hold."""

from __future__ import annotations

import pytest

from benchmarks.sft_sides.rounds import StepTaken
from benchmarks.sft_sides.table import ENOUGH, WARM_UP, Limit, by_wall, differing, is_clean, lines, rate

SLOW = StepTaken(wall=100.0, cpu=100.0, loss=9.0, tokens=100, labels=60, ids=7)
"""A step of the warm-up"""


def _steps(*wall: float, cpu: float = 1.0, loss: float = 2.0) -> list[StepTaken]:
    taken = [StepTaken(wall=seconds, cpu=cpu, loss=loss, tokens=100, labels=60, ids=7) for seconds in wall]
    return [SLOW] * WARM_UP + taken


def _judged(sides: dict[str, list[StepTaken]], *limits: Limit, same: tuple[str, ...] = ()) -> tuple[str, bool]:
    text, holds = lines(sides, ours="mine", limits=limits, same_loss=("mine", *same))
    return "\n".join(text), holds


def test_a_step_is_clean_below_a_tenth_more_of_the_wall_clock() -> None:
    clean, waited = _steps(1.09, 1.1)[WARM_UP:]
    assert is_clean(clean)
    assert not is_clean(waited)


def test_rates_leave_out_the_warm_up_and_steps_that_waited() -> None:
    """Claim: 100 tokens in 0.8, 1.0 and 1.05 s are medians of 100/s; by CPU time the step that waited counts too."""
    steps = _steps(0.8, 1.0, 1.05, 50.0)
    found = rate(steps, wall=True)
    assert (found.low, found.median, found.high) == pytest.approx(((100 + 100 / 1.05) / 2, 100.0, 112.5))
    assert rate(steps, wall=False).high == 100.0
    assert rate(_steps(0.5), wall=True).median == 200.0


def test_the_wall_clock_needs_enough_clean_steps_on_every_side() -> None:
    enough, short = _steps(*[1.0] * ENOUGH), _steps(*[1.0] * (ENOUGH - 1), 9.0)
    assert by_wall({"mine": enough, "other": enough})
    assert not by_wall({"mine": enough, "other": short})


def test_limits_are_against_the_fastest_of_their_sides() -> None:
    """Claim: ours is twice as fast as the slow one and 1.25 times as the fast one; the latter counts."""
    sides = {"mine": _steps(*[0.4] * 5, cpu=0.4), "fast": _steps(*[0.5] * 5, cpu=0.5), "slow": _steps(*[0.8] * 5)}
    text, holds = _judged(sides, Limit(("slow", "fast"), 1.2))
    assert holds
    assert "1.25 times as fast as fast (limit 1.2): holds" in text
    text, holds = _judged(sides, Limit(("slow", "fast"), 1.3))
    assert not holds
    assert "1.25 times as fast as fast (limit 1.3): DOES NOT HOLD" in text


@pytest.mark.parametrize(("loss", "holds"), [(2.0009, True), (2.0011, False), (1.9989, False)])
def test_last_losses_are_ours(loss: float, holds: bool) -> None:
    sides = {"mine": _steps(*[1.0] * 5), "other": _steps(*[1.0] * 5, loss=loss)}
    assert _judged(sides, same=("other",))[1] is holds
    assert _judged(sides)[1], "a side that is not named may differ"


def test_other_tokens_labels_or_ids_are_told() -> None:
    mine = _steps(1.0)
    assert differing({"mine": mine, "other": _steps(2.0)}) is None
    for field in ("tokens", "labels", "ids"):
        other = [*mine[:-1], StepTaken(**{**vars(mine[-1]), field: 99})]
        told = differing({"mine": mine, "other": other})
        assert told is not None
        assert f"step {WARM_UP} of other" in told
