"""Which ranks say how a run ended: one, where ranks know of each other."""

from __future__ import annotations

import time

import pytest

from prism_megatron.engine.launch import report_error
from prism_megatron.errors import LostRankError, RunStopped


@pytest.mark.parametrize(
    ("rank", "speaker", "speaks"),
    [(0, 0, True), (1, 0, False), (1, 1, True), (0, 1, False), (0, None, True), (1, None, True)],
)
def test_the_speaker_says_what_was_lost_or_all_where_there_is_none(
    rank: int, speaker: int | None, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: a speaker does not wait, for others end without a word; without one rank 0 is left a second."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", str(rank))
    assert report_error(LostRankError("b is gone", speaker=speaker)) == 1
    assert capsys.readouterr().err == ("error: b is gone\n" if speaks else "")
    assert waited == ([1.0] if speaker is None and rank else [])


def test_a_run_that_stopped_is_said_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert report_error(RunStopped("stopped")) == 3
    assert capsys.readouterr().err == "stopped\n"
