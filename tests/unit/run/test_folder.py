"""What a run's folder is called and holds (blind spot: several hosts that name one at the same time)."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.run import folder
from prism_megatron.run.folder import folder_of_new_run, holds_run, move_aside, newest_config, remove_halves, run_of


def test_two_runs_of_one_second_have_two_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.time, "strftime", lambda form: form.replace("%Y%m%d-%H%M%S", "now"))  # type: ignore[attr-defined]
    claimed = [folder_of_new_run("warm-start") for _ in range(3)]
    assert [path.name for path in claimed] == ["warm-start-now", "warm-start-now-2", "warm-start-now-3"]
    assert all(path.is_dir() and path.parent == Path("runs") for path in claimed)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints"])
def test_rows_or_checkpoints_make_a_run(left: str, tmp_path: Path) -> None:
    assert not holds_run(tmp_path)
    (tmp_path / left).mkdir()
    assert holds_run(tmp_path)


def test_a_checkpoint_knows_the_run_it_lies_in(tmp_path: Path) -> None:
    assert run_of(tmp_path / "run" / "checkpoints" / "step_000004") == tmp_path / "run"
    assert run_of(tmp_path / "somewhere" / "step_000004") is None


def test_the_newest_configuration_is_that_of_the_latest_part(tmp_path: Path) -> None:
    assert newest_config(tmp_path) is None
    (tmp_path / "config.yaml").touch()
    assert newest_config(tmp_path) == tmp_path / "config.yaml"
    for step in (40, 8, 120):
        (tmp_path / f"config-step_{step:06d}.yaml").touch()
    assert newest_config(tmp_path) == tmp_path / "config-step_000120.yaml"


def test_what_an_earlier_try_left_is_kept_aside(tmp_path: Path) -> None:
    """Claim: nothing is lost or overwritten, however often a run is begun anew."""
    for attempt in ("1", "2"):
        (tmp_path / "metrics.jsonl").write_text(attempt)
        (tmp_path / "checkpoints").mkdir()
        assert move_aside(tmp_path) == tmp_path / f"earlier-{attempt}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "earlier-2"]
    for attempt in ("1", "2"):
        assert (tmp_path / f"earlier-{attempt}" / "metrics.jsonl").read_text() == attempt
        assert (tmp_path / f"earlier-{attempt}" / "checkpoints").is_dir()


def test_what_a_killed_command_had_half_written_is_removed(tmp_path: Path) -> None:
    """Claim: a model on its way and files on theirs, by the names that writers give them; nothing else."""
    kept = {"hf", "metrics.jsonl", ".lock", ".hfx", "summary.json.part"}
    for name in ("hf", ".hf.12ab34cd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    for name in (*kept - {"hf"}, ".summary.json.4711.part"):
        (tmp_path / name).touch()
    remove_halves(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "hf" / "model.safetensors").exists()
