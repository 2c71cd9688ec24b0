"""What a run's checkpoints keep beside the weights (blind spot: the weights, which ``tests/distributed`` has)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.errors import CheckpointError
from prism_megatron.run import checkpoints
from prism_megatron.run.checkpoints import Checkpoints, as_written_today

LOAD = "prism_megatron.run.checkpoints.checkpoint.load"
TODAY = {"step": 4, "seed": 7, "stage": "align", "good_step": 2, "kept": {"controls": {}, "replay": [], "probe": ["p"]}}


def test_states_of_version_0_1_0_are_read_as_if_written_today() -> None:
    """Claim: an alignment's game and a warm-start's nothing come back in the places where they are kept now."""
    game: dict[str, Any] = {"memory": {"controls": {}, "replay": []}, "probe": ["p"], "good_step": 2}
    aligned = as_written_today({"step": 4, "seed": 7, "game": game}, Path("x"))
    assert {name: aligned[name] for name in TODAY} == TODAY
    warm = as_written_today({"step": 4, "seed": 7, "stage": "warm-start"}, Path("x"))
    assert (warm["stage"], warm["good_step"], warm["kept"]) == ("warm-start", None, {})
    assert as_written_today(TODAY, Path("x")) == TODAY


@pytest.mark.parametrize("state", [{}, {"step": 1}, {"game": {}, "seed": 1}])
def test_a_state_that_no_run_wrote_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"x was not saved by a run .* name it with --model or --discriminator"):
        as_written_today(state, Path("x"))


class Restored:
    """A stage that writes down what it is given back."""

    name, total_steps = "align", 5

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def engines(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        self.kept.append(state["controls"])


@pytest.fixture
def restore(monkeypatch: pytest.MonkeyPatch) -> Any:
    loaded: list[Path] = []
    monkeypatch.setattr(LOAD, lambda folder, _engines: loaded.append(folder))

    def run(state: dict[str, Any], *, seed: int = 7) -> tuple[int, Checkpoints, Restored, list[Path]]:
        monkeypatch.setattr(checkpoints, "read_state", lambda _folder: {"state": state})
        stage: Any = Restored()
        own = Checkpoints(Path("out"))
        return own.restore(stage, Path("ckpt"), seed=seed), own, stage, loaded

    return run


def test_a_run_goes_on_with_what_was_kept(restore: Any) -> None:
    step, own, stage, loaded = restore(TODAY)
    assert (step, own.good_step, stage.kept, loaded) == (4, 2, [{}], [Path("ckpt")])
    assert restore({**TODAY, "step": 5})[0] == 5, "a run at its end may be exported again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "warm-start"}, "was saved by a run of warm-start, and this is one of align"),
        ({"step": 6}, "is past --steps 5; ask for at least 6"),
        ({"seed": 8}, "belongs to --seed 8, this run has --seed 7"),
        ({"kept": {}}, "is damaged, or of another version"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(restore: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        restore({**TODAY, **changes})


def test_only_a_good_step_is_gone_back_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Claim: saving a bad step leaves the newest good one, which is in the state that is saved."""
    states: list[Any] = []

    def save(_folder: Path, _engines: Any, state: Any, *, models: Any) -> None:
        del models
        states.append(state)

    monkeypatch.setattr("prism_megatron.run.checkpoints.checkpoint.save", save)
    stage: Any = SimpleNamespace(name="align", engines=dict, models={}, state=lambda: {"kept": 1})
    own = Checkpoints(tmp_path)
    for step, good in ((2, True), (4, False), (6, True), (8, False)):
        assert own.save(stage, step, seed=7, good=good) == tmp_path / "checkpoints" / f"step_00000{step}"
    assert [state["good_step"] for state in states] == [2, 2, 6, 6]
    assert states[-1] == {"step": 8, "seed": 7, "stage": "align", "good_step": 6, "kept": {"kept": 1}}


@pytest.mark.parametrize("load", [".", "checkpoints", "checkpoints/step_000004"])
def test_the_good_checkpoint_may_be_the_earlier_runs(
    load: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Claim: it is found whether ``--load`` named the run, its checkpoints or one of these; the own run comes first."""
    monkeypatch.setattr(checkpoints, "broadcast_object", lambda value, source: value)  # noqa: ARG005
    loaded: list[Path] = []
    monkeypatch.setattr(LOAD, lambda folder, _engines: loaded.append(folder))
    earlier, later = (tmp_path / name / "checkpoints" / "step_000002" for name in ("earlier", "later"))
    earlier.mkdir(parents=True)
    own = Checkpoints(tmp_path / "later", tmp_path / "earlier" / load, good_step=2)
    assert own.go_back({}).resolve() == earlier
    later.mkdir(parents=True)
    assert own.go_back({}) == later == loaded[-1]
    own.good_step = 3
    with pytest.raises(CheckpointError, match="step_000003, which a rollback goes back to, is gone"):
        own.go_back({})
