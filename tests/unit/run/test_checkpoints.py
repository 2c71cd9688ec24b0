"""What a run's checkpoints keep beside the weights (blind spot: the weights, which ``tests/distributed`` has)."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.errors import CheckpointError, DiskError
from prism_megatron.run import checkpoints
from prism_megatron.run.checkpoints import Checkpoints
from prism_megatron.run.saved import SavedRun, as_written_today

LOAD = "prism_megatron.run.checkpoints.checkpoint.load"
BEGIN = "prism_megatron.run.checkpoints.checkpoint.begin"
DATA = {"flag": "data", "count": 3, "digest": "d", "batch_size": 2}
TODAY = {"step": 4, "seed": 7, "stage": "align", "good_step": 2, "best_step": None, "run": "r1", "idle": {},
         "kept": {"controls": {}, "replay": [], "probe": ["p"]}, "config": {"seed": 7}, "data": DATA}  # fmt: skip
NAMELESS: dict[str, Any] = {"best_step": None, "run": None, "config": None, "data": None, "idle": {}}


class Written:
    """A save whose bytes are written when ``is_done`` says so; ``finish`` makes the folder, or raises ``problem``."""

    def __init__(self, folder: Path, *, is_done: bool = True, problem: Exception | None = None) -> None:
        self.folder, self.is_done, self.problem = folder, is_done, problem
        self.was_abandoned = False

    def is_written(self) -> bool:
        return self.is_done

    def finish(self) -> None:
        if self.problem is not None:
            raise self.problem
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "state.json").touch()

    def abandon(self) -> None:
        self.was_abandoned = True


def test_states_of_version_0_1_0_are_read_as_if_written_today() -> None:
    """Claim: an alignment's game and a warm-start's nothing come back in the places where they are kept now."""
    game: dict[str, Any] = {"memory": {"controls": {}, "replay": []}, "probe": ["p"], "good_step": 2}
    aligned = as_written_today({"step": 4, "seed": 7, "game": game}, Path("x"))
    assert {name: aligned[name] for name in TODAY} == TODAY | NAMELESS
    warm = as_written_today({"step": 4, "seed": 7, "stage": "warm-start"}, Path("x"))
    assert (warm["stage"], warm["good_step"], warm["kept"]) == ("warm-start", None, {})
    assert {name: warm[name] for name in NAMELESS} == NAMELESS
    assert as_written_today(TODAY, Path("x")) == TODAY
    for stage, best in (("align", None), ("sft", 2), ("rlvr", 2), ("warm-start", None)):
        without = {name: value for name, value in (TODAY | {"stage": stage}).items() if name != "best_step"}
        assert as_written_today(without, Path("x")) == TODAY | {"stage": stage, "best_step": best}
    unnamed = {name: value for name, value in TODAY.items() if name not in NAMELESS}
    assert as_written_today(unnamed, Path("x")) == TODAY | NAMELESS


@pytest.mark.parametrize("state", [{}, {"step": 1}, {"game": {}, "seed": 1}])
def test_a_state_that_no_run_wrote_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"x was not saved by a run .* name it with --model or --discriminator"):
        as_written_today(state, Path("x"))


class Restored:
    """A stage that writes down what it is given back."""

    name, total_steps, identity = "align", 5, DATA

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

    def run(
        state: dict[str, Any], *, seed: int = 7, change: tuple[str, ...] = (), say: Any = print
    ) -> tuple[int, Checkpoints, Restored, list[Path]]:
        stage: Any = Restored()
        own = Checkpoints(Path("out"))
        return own.restore(stage, SavedRun(Path("ckpt"), state), seed=seed, change=change, say=say), own, stage, loaded

    return run


def test_a_run_goes_on_with_what_was_kept(restore: Any) -> None:
    step, own, stage, loaded = restore(TODAY)
    assert (step, own.good_step, own.best_step, stage.kept, loaded) == (4, 2, None, [{}], [Path("ckpt")])
    assert restore({**TODAY, "best_step": 3})[1].best_step == 3
    assert restore({**TODAY, "step": 5})[0] == 5, "a run at its end may be exported again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 6}, "is past --steps 5; ask for at least 6"),
        ({"seed": 8}, "belongs to --seed 8, this run has --seed 7"),
        ({"kept": {}}, "is damaged, or of another version"),
        ({"data": {**DATA, "count": 4}}, r"--data is not what ckpt was trained on: there were 4 .* --change data"),
        ({"data": {**DATA, "digest": "e"}}, "not the same ones in the same order"),
        ({"data": {**DATA, "batch_size": 4}}, "batches of 4 are now of 2"),
        ({"data": {"flag": "data"}}, "what ckpt says of its data is damaged"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(restore: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        restore({**TODAY, **changes})


def test_what_was_asked_for_may_change(restore: Any) -> None:
    """Claim: leave to change data or seed is leave for that alone."""
    other = {**TODAY, "data": {**DATA, "count": 4}}
    assert restore(other, change=("data",))[0] == 4
    said: list[str] = []
    assert restore(other, change=("--prompts_per_step",), say=said.append)[0] == 4
    assert said == ["--data is not what ckpt was trained on: there were 4 examples and are 3"]
    with pytest.raises(CheckpointError, match="--data is not what"):
        restore(other, change=("policy.lr", "seed"))
    assert restore(TODAY, seed=8, change=("seed",))[0] == 4
    with pytest.raises(CheckpointError, match="belongs to --seed 7"):
        restore(TODAY, seed=8, change=("data",))
    assert restore(TODAY | NAMELESS)[0] == 4, "an older version kept nothing of its data"


def test_only_a_good_step_is_gone_back_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Claim: saving a bad step leaves the newest good one, which is in the state that is saved."""
    states: list[Any] = []

    def begin(folder: Path, _engines: Any, state: Any, *, models: Any, aside: bool) -> Written:
        del models
        assert not aside
        states.append(state)
        return Written(folder)

    monkeypatch.setattr(BEGIN, begin)
    stage: Any = SimpleNamespace(name="align", engines=dict, models={}, state=lambda: {"kept": 1}, identity=DATA)
    own = Checkpoints(tmp_path, None, "r1", {"seed": 7})
    for step, good in ((2, True), (4, False), (5, False), (6, True), (8, False)):
        folder = own.save(stage, step, seed=7, good=good, best=step == 4)
        assert folder == tmp_path / "checkpoints" / f"step_00000{step}"
    assert [state["good_step"] for state in states] == [2, 2, 2, 6, 6]
    assert [state["best_step"] for state in states] == [None, 4, 4, 4, 4]
    assert (own.good_step, own.best_step) == (6, 4)
    assert states[-1] == {"step": 8, "seed": 7, "stage": "align", "good_step": 6, "best_step": 4, "kept": {"kept": 1},
                          "run": "r1", "config": {"seed": 7}, "data": DATA, "idle": {}}  # fmt: skip


@pytest.mark.parametrize(
    ("keep_last", "bad", "best", "left"),
    [
        (1, (), (), [10]),
        (2, (), (), [8, 10]),
        (3, (), (), [6, 8, 10]),
        (2, (6, 8, 10), (), [4, 8, 10]),
        (1, (2, 4, 6, 8, 10), (), [10]),
        (1, (), (4, 6), [6, 10]),
        (1, (8, 10), (2,), [2, 6, 10]),
    ],
)
def test_the_newest_are_kept_the_good_one_and_the_best_one(
    *,
    keep_last: int,
    bad: tuple[int, ...],
    best: tuple[int, ...],
    left: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Claim: a kill while older ones are removed leaves more, and what it leaves is cleared by the next save."""
    monkeypatch.setattr(checkpoints, "on_main", lambda work: work())

    monkeypatch.setattr(BEGIN, lambda folder, *_, **__: Written(folder))
    stage: Any = SimpleNamespace(name="align", engines=dict, models={}, state=dict, identity=DATA)
    own = Checkpoints(tmp_path, keep_last=keep_last)
    root = tmp_path / "checkpoints"
    (root / ".step_000001.removed" / "x").mkdir(parents=True)
    (root / "step_000003").mkdir()  # no checkpoint: without its state it does not count, and is nobody's to remove
    for step in (2, 4, 6, 8, 10):
        own.save(stage, step, seed=7, good=step not in bad, best=step in best)
        assert (root / f"step_{step:06d}").is_dir()
    assert sorted(path.name for path in root.iterdir()) == sorted([*(f"step_{n:06d}" for n in left), "step_000003"])


@dataclass
class Aside:
    """A run that saves beside its steps, every save by hand."""

    own: Checkpoints
    begun: list[Written]
    stage: Any

    def save(self, step: int, *, good: bool = True, best: bool = False) -> Written:
        self.own.save(self.stage, step, seed=7, good=good, best=best)
        return self.begun[-1]

    @property
    def there(self) -> list[str]:
        return sorted(path.name for path in (self.own.output / "checkpoints").glob("*"))


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Aside:
    monkeypatch.setattr(checkpoints, "on_main", lambda work: work())
    begun: list[Written] = []

    def begin(folder: Path, _engines: Any, _state: Any, *, models: Any, aside: bool) -> Written:
        del models
        assert aside
        begun.append(Written(folder, is_done=False))
        return begun[-1]

    monkeypatch.setattr(BEGIN, begin)
    stage: Any = SimpleNamespace(name="align", engines=dict, models={}, state=dict, identity=DATA)
    return Aside(Checkpoints(tmp_path, keep_last=1, save_async=True), begun, stage)


def test_a_save_beside_the_steps_counts_once_it_is_there(aside: Aside) -> None:
    """Claim: with ``--keep-last 1`` the older checkpoint stays until the newer one is committed; one at a time."""
    aside.save(2, best=True)
    assert (aside.there, aside.own.good_step, aside.own.best_step) == ([], None, None)
    assert aside.own.under_way == aside.own.output / "checkpoints" / "step_000002"
    assert aside.own.poll() is None and aside.there == []
    aside.begun[-1].is_done = True
    assert aside.own.poll() == aside.begun[0].folder and aside.own.poll() is None
    assert (aside.there, aside.own.good_step, aside.own.best_step) == (["step_000002"], 2, 2)
    aside.save(4, best=True)
    assert (aside.there, aside.own.good_step, aside.own.best_step) == (["step_000002"], 2, 2)
    aside.save(6)
    assert aside.there == ["step_000004"], "the next save waits for the one before, which makes it the oldest kept"
    assert aside.own.settle() == aside.begun[-1].folder
    assert (aside.there, aside.own.good_step, aside.own.best_step) == (["step_000004", "step_000006"], 6, 4)
    assert aside.own.settle() is None and aside.own.under_way is None


def test_a_rollback_waits_for_the_save_under_way(aside: Aside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the checkpoint that is being written is the newest good one; going back loads it, not the one before."""
    loaded: list[str] = []
    monkeypatch.setattr(LOAD, lambda folder, _engines: loaded.append(folder.name))
    monkeypatch.setattr(checkpoints, "broadcast_object", lambda value, source: value)  # noqa: ARG005
    aside.save(2)
    aside.own.settle()
    aside.save(4)
    aside.own.go_back({})
    assert loaded == ["step_000004"]
    aside.save(6, good=False)
    aside.own.go_back({})
    assert loaded == ["step_000004", "step_000004"] and aside.there == ["step_000004", "step_000006"]


def test_a_save_that_fails_leaves_what_was_there(aside: Aside) -> None:
    """Claim: older checkpoints are neither removed for it nor forgotten; nor for one that a failed run abandons."""
    aside.save(2)
    aside.own.settle()
    aside.save(4).problem = DiskError("full")
    with pytest.raises(DiskError):
        aside.own.settle()
    assert (aside.there, aside.own.good_step, aside.own.under_way) == (["step_000002"], 2, None)
    left = aside.save(6)
    aside.own.abandon()
    aside.own.abandon()
    assert left.was_abandoned and aside.own.settle() is None
    assert (aside.there, aside.own.good_step) == (["step_000002"], 2)


FILES = ("policy/a.distcp", "policy/b.distcp", "state.json")


def whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


@pytest.mark.parametrize("operation", range(11))
def test_a_kill_in_the_middle_of_a_removal_costs_no_checkpoint(
    operation: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Claim: SIGKILL before any change of the disk leaves whole folders, and all those that are to be kept.

    Two folders go, each by a rename, three files and two folders: 12 changes, of which the first 11 are killed.
    """
    monkeypatch.setattr(checkpoints, "on_main", lambda work: work())
    monkeypatch.setattr(BEGIN, lambda folder, *_, **__: Written(folder))
    stage: Any = SimpleNamespace(name="align", engines=dict, models={}, state=dict, identity=DATA)
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        for name in FILES:
            file = root / f"step_{step:06d}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    own = Checkpoints(tmp_path, keep_last=1, good_step=2)
    child = os.fork()
    if child == 0:
        changes = 0

        def watch(event: str, _arguments: tuple[object, ...]) -> None:
            nonlocal changes
            if event in ("os.rename", "os.remove", "os.rmdir"):
                if changes == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                changes += 1

        sys.addaudithook(watch)
        own.save(stage, 4, seed=7, good=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert all(whole(folder) for folder in root.glob("step_*"))
    assert {"step_000002", "step_000004"} <= {folder.name for folder in root.glob("step_*")}
    own.save(stage, 4, seed=7, good=False)
    assert sorted(path.name for path in root.iterdir()) == ["step_000002", "step_000004"]


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


def test_a_run_that_played_no_step_here_has_the_checkpoint_it_goes_on_from(restore: Any, tmp_path: Path) -> None:
    own = restore(TODAY)[1]
    assert own.newest == Path("ckpt")
    own.output = tmp_path
    (tmp_path / "checkpoints" / "step_000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000005" / "state.json").touch()
    assert own.newest == tmp_path / "checkpoints" / "step_000005"
