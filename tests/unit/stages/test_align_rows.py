"""The gap between rollout and trainer as a step reports it, when it raises the alarm, and importance weights."""

from __future__ import annotations

import math

import pytest

from prism_megatron.stages.align.rows import gap_alarms, gap_row, importance_row


def sums(*, text: float, image: float, image_tokens: int = 30) -> dict[str, float]:
    """Ten text tokens; ``text`` and ``image`` are the summed gaps."""
    return {
        "gap/text/tokens": 10.0,
        "gap/text/sum": text,
        "gap/text/kl": 1.0,
        "gap/text/max": text,
        "gap/image/tokens": float(image_tokens),
        "gap/image/sum": image,
        "gap/image/kl": 3.0,
        "gap/image/max": image,
    }


def test_text_and_image_prompts_are_apart() -> None:
    row = gap_row(sums(text=0.5, image=6.0))
    assert row["logprob_gap"] == pytest.approx(6.5 / 40)
    assert row["logprob_gap/text/mean"] == pytest.approx(0.05)
    assert row["logprob_gap/image/mean"] == pytest.approx(0.2)
    assert row["logprob_gap/image/kl"] == pytest.approx(0.1)
    assert (row["logprob_gap/text/max"], row["logprob_gap/image/max"]) == (0.5, 6.0)


def test_the_alarm_names_the_prompts_that_are_off() -> None:
    """Stale image weights show in image prompts alone, however many text tokens dilute the mean of the step."""
    row = {"step": 7} | gap_row(sums(text=0.1, image=6.0))
    (line,) = gap_alarms(row, 0.05)
    assert "step 8" in line
    assert "0.2 a token for image prompts" in line
    assert "--logprob-gap-alarm 0.05" in line
    assert gap_alarms(row, 0.3) == []


def test_a_gap_that_is_no_number_raises_the_alarm_and_missing_prompts_do_not() -> None:
    assert len(gap_alarms({"step": 0} | gap_row(sums(text=math.nan, image=0.0)), 0.05)) == 1
    row = gap_row(sums(text=0.1, image=0.0, image_tokens=0))
    assert row["logprob_gap/image/mean"] is row["logprob_gap/image/max"] is row["logprob_gap/image/kl"] is None
    assert gap_alarms({"step": 0} | row, 0.05) == []


def test_importance_weights_are_shares_of_the_tokens() -> None:
    """Weights 1, 1, 1 and 3: three quarters are within the bound, and they count as 36/12 = 3 tokens of 4."""
    sums = {
        "importance/tokens": 4.0,
        "importance/sum": 6.0,
        "importance/squares": 12.0,
        "importance/truncated": 1.0,
        "importance/max": 3.0,
    }
    assert importance_row(sums) == {
        "importance/mean": 1.5,
        "importance/max": 3.0,
        "importance/truncated_share": 0.25,
        "importance/effective_share": 0.75,
    }
