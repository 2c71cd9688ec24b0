"""Claim: a command says what its run needs before any rank starts, and refuses what a device does not hold.

Blind spot: the size of a GPU that is there; and what a GPU's libraries take.
"""

from __future__ import annotations

import pytest

from prism_megatron.commands import align
from prism_megatron.commands.starting import foretold, on_ranks
from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.errors import PrismError


def test_an_alignment_that_does_not_fit_starts_no_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: both players are played on the first and the last stage, and the refusal names them and the flags."""
    monkeypatch.delattr(on_ranks, "launch")
    status = align.main(["--pp", "2", "--device-gib", "0.1", "--device-reserve-gib", "0.09"])
    said = capsys.readouterr()
    assert status == PrismError.status, said
    rows = [line.split()[:2] for line in said.out.splitlines() if line.strip()[:1].isdigit()]
    assert [row for row in rows if row[1] != "at"] == [
        [rank, role] for rank in ("0", "1") for role in ("policy", "discriminator")
    ]
    assert "a device of 0.1 GiB has 0.01 beside" in said.err
    assert "--recompute full" in said.err


def test_without_a_device_nothing_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a run of a mini on CPUs is as fast as ever: no forecast unless a device is there or its size is given."""
    monkeypatch.setattr(foretold, "has_gpu", lambda: False)
    config = align.parse([])
    assert align.foretell(config, FirstRank()) == config
    monkeypatch.setattr(foretold, "has_gpu", lambda: True)
    assert foretold.wants_forecast(config)
    assert not foretold.wants_forecast(align.parse(["--forecast", "off"]))
