"""metrics.jsonl survives kills and resumes; shares without data stay null; the summary sums up the rows."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.disk import write_atomically
from prism_megatron.errors import DataError
from prism_megatron.evaluation.game_summary import game_summary
from prism_megatron.observability.metrics import MetricsWriter, Row, read_metrics
from prism_megatron.observability.summary import RunFacts, summarise, write_summary
from prism_megatron.observability.timers import PhaseTimers

FACTS = RunFacts(
    world_size=8,
    layout={"tp": 4, "pp": 2, "cp": 1, "dp": 1, "ep": 1},
    hf_export="run/hf",
    checkpoint=None,
    megatron_core="0.16.1",
    torch="2.13",
    other_seconds={"start": 3.0, "policy": 0.5},
)


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "policy_version": step + 1,
        "rollouts": 8,
        "valid_rollouts": 4,
        "valid_share": 0.5,
        "response_tokens": 100,
        "perception/pairs": 4,
        "perception/accuracy": 0.75,
        "perception/reward_gap": 2.0,
        "reasoning/pairs": 0,
        "reasoning/accuracy": None,
        "reasoning/reward_gap": None,
        "policy_grad_norm": 0.5,
        "seconds/rollout": 1.0,
        "seconds/policy": 3.0,
        **changes,
    }


def test_resume_drops_the_steps_that_are_played_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path, first_step=0)
    for step in range(5):
        writer.write(row(step))
    writer.close()
    resumed = MetricsWriter(path, first_step=3)
    resumed.write(row(3, valid_share=1.0))
    assert [(r["step"], r["valid_share"]) for r in read_metrics(path)] == [(0, 0.5), (1, 0.5), (2, 0.5), (3, 1.0)]
    with pytest.raises(ValueError, match="at least 4"):
        resumed.write(row(3))


def test_a_killed_writer_keeps_every_finished_row(tmp_path: Path) -> None:
    """SIGKILL right after write() loses no row; a line that was cut is dropped on resume, not glued to the next."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from prism_megatron.observability.metrics import MetricsWriter\n"
        "writer = MetricsWriter(Path(sys.argv[1]), first_step=0)\n"
        "writer.write({'step': 0}); writer.write({'step': 1}); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -signal.SIGKILL
    with path.open("a") as file:
        file.write('{"step": 2, "valid')
    assert [r["step"] for r in read_metrics(path)] == [0, 1]
    MetricsWriter(path, first_step=2).write({"step": 2})
    assert [r["step"] for r in read_metrics(path)] == [0, 1, 2]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path, first_step=0).write({"step": 0, "a": math.nan, "b": math.inf, "c": None, "d": 1.5})
    assert path.read_text() == '{"step": 0, "a": null, "b": null, "c": null, "d": 1.5}\n'


@pytest.mark.parametrize("line", ["{oops}", "[1]", '{"step": "0"}', "\x00", "[" * 100_000])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_an_interrupted_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"


def test_what_replaces_a_file_is_whole_and_on_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: at the moment of the flush to disk the new text is complete and the old file still in its place. Blind to
    what a disk makes of a flush."""
    path = tmp_path / "summary.json"
    seen: list[tuple[str, str]] = []

    def fsync(fd: int) -> None:
        seen.append((Path(f"/proc/self/fd/{fd}").read_text(), path.read_text()))

    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, "new")
    assert seen == [("new", "old")]
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def whole_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """As a run of a game writes it."""
    return {**summarise(rows, FACTS), **game_summary(rows)}


def test_summary_pools_by_count_and_keeps_missing_data_missing() -> None:
    rows = [row(0, **{"perception/pairs": 12, "perception/accuracy": 0.25}), row(1)]
    summary = whole_summary(rows)
    assert summary["disc_accuracy"] == {"perception": (12 * 0.25 + 4 * 0.75) / 16, "reasoning": None}
    assert summary["reward_gap"] == {"perception": 2.0, "reasoning": None}
    assert summary["pairs"] == {"perception": 16, "reasoning": 0}
    assert summary["tokens_per_second"] == 200 / 8
    assert summary["seconds_by_phase"] == {"start": 3.0, "rollout": 2.0, "policy": 6.5}
    assert summary["largest_grad_norm"] == {"policy": 0.5, "discriminator": None}
    assert (summary["steps"], summary["policy_version"]) == (2, 2)


def test_summary_looks_at_the_last_ten_steps_and_totals_at_all() -> None:
    rows = [row(step, valid_share=0.0 if step < 5 else 1.0) for step in range(15)]
    summary = whole_summary(rows)
    assert (summary["valid_share"], summary["window_steps"], summary["rollouts"]) == (1.0, 10, 80)
    assert summary["totals"]["rollouts"] == 120


def test_each_figure_of_the_summary_has_its_own_count_and_its_own_steps() -> None:
    """Rows from step 5 on, as of a run that went on in a new folder; each figure's counts differ from all others."""
    early = row(5, rolled_back=1, policy_grad_norm=9.0, discriminator_grad_norm=4.0)
    steps = [row(step, policy_grad_norm=0.25) for step in range(6, 15)]
    figures = {
        "reasoning/pairs": 10,
        "reasoning/auc": 0.5,
        "reasoning/auc_pairs": 1,
        "reasoning/length_correlation": 0.2,
        "reasoning/length_correlation_count": 3,
        "tower_agreement": 0.5,
        "tower_agreement_groups": 1,
    }
    others = {
        "reasoning/pairs": 30,
        "reasoning/auc": 1.0,
        "reasoning/auc_pairs": 4,
        "reasoning/length_correlation": 0.6,
        "reasoning/length_correlation_count": 1,
        "tower_agreement": 1.0,
        "tower_agreement_groups": 3,
    }
    summary = whole_summary([early, *steps, row(15, **figures), row(17, rolled_back=1, **others)])
    assert (summary["steps"], summary["policy_version"], summary["window_steps"]) == (18, 18, 10)
    assert summary["auc"]["reasoning"] == pytest.approx((0.5 + 4 * 1.0) / 5)
    assert summary["length_correlation"]["reasoning"] == pytest.approx((3 * 0.2 + 0.6) / 4)
    assert summary["tower_agreement"] == pytest.approx((0.5 + 3 * 1.0) / 4)
    assert (summary["pairs"]["reasoning"], summary["auc_pairs"]["reasoning"]) == (40, 5)
    assert summary["rollbacks"] == 2, "of all steps, not of the last ten"
    assert summary["largest_grad_norm"] == {"policy": 9.0, "discriminator": 4.0}


def test_a_run_without_steps_has_no_numbers() -> None:
    summary = whole_summary([])
    assert (summary["steps"], summary["rollouts"], summary["valid_share"]) == (0, 0, None)
    assert summary["tokens_per_second"] is None


def test_summary_file_has_the_promised_keys(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", whole_summary([row(0)]))
    summary = json.loads((tmp_path / "summary.json").read_text())
    promised = (
        "steps policy_version world_size layout reward_gap disc_accuracy valid_share tokens_per_second "
        "seconds_by_phase hf_export checkpoint megatron_core torch"
    )
    assert set(promised.split()) <= set(summary)
    assert set(summary["layout"]) == {"tp", "pp", "cp", "dp", "ep"}
    assert set(summary["reward_gap"]) == set(summary["disc_accuracy"]) == {"perception", "reasoning"}


def test_timers_add_up_and_start_again_after_take() -> None:
    now = iter([0.0, 2.0, 2.0, 5.0, 5.0, 6.0, 10.0, 14.0])
    timers = PhaseTimers(clock=lambda: next(now))
    for name in ("rollout", "policy", "rollout"):
        with timers.phase(name):
            pass
    assert timers.take() == {"rollout": 3.0, "policy": 3.0}
    with pytest.raises(RuntimeError), timers.phase("save"):
        raise RuntimeError
    assert timers.take() == {"save": 4.0}
    assert timers.take() == {}
