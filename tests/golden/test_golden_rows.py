"""Claim: whole runs of alignment and warm-start give the rows they gave when the golden files were made.

Where versions and the CPU are those of the file, every figure is equal to the last bit. Elsewhere kernels round
otherwise, and figures are compared within 1e-3: two layouts of one of these runs, which round otherwise too, agree
within 1e-6 in every step that they share.
``make golden`` writes the files anew. Blind spot: one seed, and draws that another rounding happens to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.testing import GlooWorld
from tests.golden.runs import RUNS, play, provenance, rows_of

FOLDER = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_its_golden_rows(name: str, gloo: GlooWorld, tmp_path: Path) -> None:
    golden = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    made_with = provenance(name)
    assert made_with["config"] == golden["made with"]["config"], "the run is another one: make golden"
    run = RUNS[name]
    ended = gloo.run(play, name, tmp_path / name, parallel=run.parallel, num_ranks=run.ranks)[0]
    rows = rows_of(tmp_path / name)
    assert ended == golden["ended"]
    assert len(rows) == len(golden["rows"]) == 6
    for row, wanted in zip(rows, golden["rows"], strict=True):
        if made_with == golden["made with"]:
            assert row == wanted
        else:
            assert_close(row, wanted)


OVERLAPPED = ("--overlap-grad-reduce", "on", "--overlap-param-gather", "on", "--bucket-parameters", "20000")


@pytest.mark.long
def test_an_alignment_that_overlaps_its_communication_is_the_same_one(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: over rollbacks, replay, checkpoints and hand-overs both players are trained as without, in many buckets.

    Norms add bucket by bucket and clip gradients, so figures are equal within 1e-5 of their size, not to the bit.
    """
    name, run = "align_dp2", RUNS["align_dp2"]
    for folder, flags in (("plain", ()), ("overlapped", OVERLAPPED)):
        gloo.run(play, name, tmp_path / folder, flags, parallel=run.parallel, num_ranks=run.ranks)
    plain, overlapped = (rows_of(tmp_path / folder) for folder in ("plain", "overlapped"))
    assert len(plain) == len(overlapped) == 6
    for row, wanted in zip(overlapped, plain, strict=True):
        assert_close(row, wanted, within=1e-5)


def assert_close(row: Mapping[str, Any], wanted: Mapping[str, Any], *, within: float = 1e-3) -> None:
    """Equal names and counts; other figures ``within`` that of their size, or 1e-5 where they are about zero."""
    assert row.keys() == wanted.keys()
    for name, value in wanted.items():
        close = value if value is None else pytest.approx(value, rel=within, abs=1e-5)
        assert row[name] == close, (row["step"], name)


def test_the_runs_cover_what_they_are_for() -> None:
    """Claim: a rollback, replayed answers, a scored probe set and updates of both players stand in the golden rows."""
    rows = {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["rows"] for name in RUNS}
    assert any(row["rolled_back"] for row in rows["align_dp2"])
    assert any(row["replayed_rollouts"] for row in rows["align_dp2"])
    assert any("probe/perception/accuracy" in row for row in rows["align_tp1"])
    for name, run in RUNS.items():
        roles = ("discriminator", "policy") if run.stage == "align" else ("discriminator",)
        assert all(row[f"{role}_updated"] == 1 for row in rows[name][:2] for role in roles)
