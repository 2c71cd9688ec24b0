"""Which folder a run gets (blind spot: several hosts that name one at the same time)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.errors import ConfigError
from prism_megatron.run import folder
from prism_megatron.run.folder import claim_run_folder

WORLD: Any = SimpleNamespace(is_main=True)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder, "broadcast_object", lambda value, source: value)  # noqa: ARG005
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints"])
def test_a_new_run_does_not_write_over_an_older_one(left: str, tmp_path: Path) -> None:
    """Claim: either of what a run leaves is enough to be refused; going on with it is not."""
    (tmp_path / "old" / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds an earlier run; go on with it by --load .*old"):
        claim_run_folder(CheckpointConfig(output=tmp_path / "old"), WORLD, kind="align")
    going_on = CheckpointConfig(output=tmp_path / "old", load=tmp_path / "old")
    assert claim_run_folder(going_on, WORLD, kind="align") == tmp_path / "old"


def test_a_run_that_goes_on_stays_in_its_folder(tmp_path: Path) -> None:
    """Claim: without ``--output`` a run folder is gone on with, and a bare checkpoint gets a new one."""
    run, bare = tmp_path / "run", tmp_path / "bare"
    for made in (run, bare):
        made.mkdir()
    (run / "config.yaml").write_text("")
    assert claim_run_folder(CheckpointConfig(load=run), WORLD, kind="align") == run
    assert claim_run_folder(CheckpointConfig(load=bare), WORLD, kind="align").parent == Path("runs")


def test_two_runs_of_one_second_have_two_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.time, "strftime", lambda form: form.replace("%Y%m%d-%H%M%S", "now"))  # type: ignore[attr-defined]
    claimed = [claim_run_folder(CheckpointConfig(), WORLD, kind="warm-start") for _ in range(3)]
    assert [path.name for path in claimed] == ["warm-start-now", "warm-start-now-2", "warm-start-now-3"]
    assert all(path.is_dir() for path in claimed)
