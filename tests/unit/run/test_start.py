"""Where a run begins: everything that is refused is refused in one line, and no file is changed for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.merge import merge, save, to_plain
from prism_megatron.config.run import RunConfig
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.warm_start import WarmStartConfig
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.conversion.checkpoints.folder import FORMAT
from prism_megatron.errors import CheckpointError, ConfigError, DataError, PrismError
from prism_megatron.run.start import Start, defaults_of, find_start, settle

Asked = Callable[..., AlignConfig]
SAVED = replace(MINI_ALIGN, steps=12, seed=5)


def write_checkpoint(
    run: Path, step: int, *, name: str | None = "r1", config: Any = SAVED, stage: str = "align", **changes: Any
) -> Path:
    """A checkpoint as far as its state goes."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    plain = None if config is None else to_plain(config)
    state = {"step": step, "seed": 5, "stage": stage, "good_step": None, "best_step": None,
             "kept": {}, "run": name, "config": plain, "data": None, "idle": {}, **changes}  # fmt: skip
    document = {"format": FORMAT, "megatron_core": "0", "torch": "0", "engines": {}, "models": {}, "state": state}
    (folder / "state.json").write_text(json.dumps(document))
    return folder


def asked(
    config: AlignConfig = SAVED, *, change: tuple[str, ...] = (), resume: Any = "no", **where: Any
) -> AlignConfig:
    run = RunConfig(resume=resume, change=change)
    return replace(config, checkpoint=replace(config.checkpoint, **where), run=run)


def hashes(folder: Path) -> dict[str, str]:
    """What is in a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 12 steps that has saved two of them."""
    folder = tmp_path / "run"
    write_checkpoint(folder, 2)
    write_checkpoint(folder, 4)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    save(SAVED, folder / "config.yaml")
    return folder


def test_a_new_run_has_an_identity_of_its_own(tmp_path: Path) -> None:
    first, second = find_start(asked(), stage="align"), find_start(asked(output=tmp_path / "new"), stage="align")
    assert (first.output, first.restored, first.begins_anew) == (None, None, False)
    assert second.output == tmp_path / "new"
    assert len({first.run, second.run}) == 2 and all(len(one.run) == 32 for one in (first, second))


def test_a_run_goes_on_as_itself_from_its_newest_checkpoint(run: Path) -> None:
    start = find_start(asked(load=run), stage="align")
    assert (start.output, start.run, start.lines) == (run, "r1", [])
    assert start.restored == run / "checkpoints" / "step_000004"


@pytest.mark.parametrize("how", ["state", "tensors", "missing"])
def test_a_damaged_newest_checkpoint_is_passed_over(run: Path, how: str) -> None:
    """Claim: ``--resume auto`` goes on from the newest one that has all its bytes, and says which was passed over, why,
    and where it will be kept; what asks for the damaged one is refused. No file is changed for it."""
    newest = write_checkpoint(run, 6)
    (newest / "data").write_bytes(b"12")
    state = newest / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "sizes": {"data": 3}}))
    if how == "state":
        state.write_text(state.read_text()[:-9])
    elif how == "missing":
        (newest / "data").unlink()
    before = hashes(run)
    start = find_start(asked(output=run, resume="auto"), stage="align")
    assert (start.output, start.run, start.damaged) == (run, "r1", (newest,))
    assert start.restored == run / "checkpoints" / "step_000004"
    (line,) = start.lines
    assert line.startswith(f"passed over a damaged checkpoint, which is kept as {newest.parent}/damaged-step_000006: ")
    assert ("has 2 of the 3 bytes" in line) is (how == "tensors")
    assert hashes(run) == before


def test_a_checkpoint_with_all_its_bytes_is_not_passed_over(run: Path) -> None:
    """Claim: neither a longer file than was written, nor a state that knows no sizes, is damage; and where no
    checkpoint is whole, nothing is begun anew."""
    state = run / "checkpoints" / "step_000004" / "state.json"
    (state.parent / "data").write_bytes(b"1234")
    state.write_text(json.dumps({**json.loads(state.read_text()), "sizes": {"data": 3}}))
    start = find_start(asked(output=run, resume="auto"), stage="align")
    assert (start.restored, start.damaged, start.lines) == (state.parent, (), [])
    for folder in state.parent.parent.iterdir():
        (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step_000004/state.json is damaged"):
        find_start(asked(output=run, resume="auto"), stage="align")


def test_a_checkpoint_is_gone_on_from_in_a_new_folder(run: Path, tmp_path: Path) -> None:
    """Claim: an older step is never gone on from in the folder that holds newer ones."""
    older = run / "checkpoints" / "step_000002"
    assert find_start(asked(load=older), stage="align").output is None
    start = find_start(asked(load=older, output=tmp_path / "other"), stage="align")
    assert start.output == tmp_path / "other"
    assert len(start.run) == 32, "what goes on elsewhere is another branch, and is never mixed with this one"
    with pytest.raises(CheckpointError, match=r"step_000004 is newer than --load .*step_000002; remove it"):
        find_start(asked(load=older, output=run), stage="align")


def test_the_same_command_is_the_first_try_and_every_later_one(tmp_path: Path, run: Path) -> None:
    fresh = find_start(asked(resume="auto", output=tmp_path / "new"), stage="align")
    assert (fresh.restored, fresh.begins_anew) == (None, False)
    later = find_start(asked(resume="auto", output=run), stage="align")
    assert (later.output, later.restored, later.run) == (run, run / "checkpoints" / "step_000004", "r1")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "metrics.jsonl").touch()
    killed = find_start(asked(resume="auto", output=tmp_path / "killed"), stage="align")
    assert (killed.restored, killed.begins_anew) == (None, True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda config: replace(config, seed=6), "--seed was 5 and is 6"),
        (lambda c: replace(c, rollout=replace(c.rollout, prompts_per_step=4)), "--prompts-per-step was 8 and is 4"),
        (
            lambda c: replace(c, rollout=replace(c.rollout, rollouts_per_prompt=2)),
            "--rollouts-per-prompt was 8",
        ),
        (
            lambda c: replace(c, policy=replace(c.policy, schedule="cosine")),
            "--policy.schedule was constant",
        ),
        (lambda c: replace(c, model=replace(c.model, model="elsewhere")), "--model was None and is elsewhere"),
        (
            lambda c: replace(c, discriminator=replace(c.discriminator, routing="dense")),
            "--routing was segment",
        ),
        (lambda c: replace(c, data=replace(c.data, data=Path("other"))), "--data was None and is other"),
    ],
)
def test_what_would_train_something_else_is_refused(run: Path, change: Any, complaint: str) -> None:
    before = hashes(run)
    for where in ({"load": run}, {"output": run, "resume": "auto"}):
        with pytest.raises(ConfigError) as caught:
            find_start(asked(change(SAVED), **where), stage="align")
        assert complaint in str(caught.value)
    assert hashes(run) == before
    flag = complaint.split(maxsplit=1)[0].removeprefix("--")
    start = find_start(asked(change(SAVED), load=run, change=(flag,)), stage="align")
    assert complaint in start.lines[0]


def test_another_layout_and_more_steps_are_said(run: Path) -> None:
    more = replace(SAVED, steps=20, parallel=replace(SAVED.parallel, tp=2))
    assert list(find_start(asked(more, load=run), stage="align").lines) == [
        "--tp was 1 and is 2",
        "--steps was 12 and is 20",
    ]


def _other_stage(run: Path) -> AlignConfig:
    write_checkpoint(run, 9, stage="warm-start")
    return asked(load=run)


def _no_checkpoint(run: Path) -> AlignConfig:
    bare = run.parent / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").touch()
    return asked(load=bare)


def _nothing(run: Path) -> AlignConfig:
    (run.parent / "empty").mkdir()
    return asked(load=run.parent / "empty")


def _another_run(run: Path) -> AlignConfig:
    write_checkpoint(run.parent / "another", 2, name="r2")
    return asked(load=run, output=run.parent / "another")


def _rows_of_another(run: Path) -> AlignConfig:
    (run.parent / "rows").mkdir()
    (run.parent / "rows" / "metrics.jsonl").touch()
    return asked(load=run, output=run.parent / "rows")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda run: asked(output=run), r"--output .*run holds an earlier run; go on with it by --load .*run, or give"),
        (_other_stage, "step_000009 was saved by a run of warm-start, and this is one of align"),
        (_no_checkpoint, r"--load .*bare holds no checkpoint.* begin it anew by --output .*bare --resume auto"),
        (_nothing, r"--load .*empty is neither a run folder nor a checkpoint"),
        (_another_run, r"were saved by two runs, which must not be mixed in .*another"),
        (_rows_of_another, r"--output .*rows holds rows of another run"),
        (
            lambda run: asked(resume="auto", load=run),
            "--resume auto finds its checkpoint in --output; leave --load out",
        ),
        (lambda _run: asked(resume="auto"), "--resume auto looks for a checkpoint in --output; name the run's folder"),
        (lambda run: asked(load=run, change=("lr",)), "--change lr: there is no such flag"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_and_nothing_changes(run: Path, make: Any, complaint: str) -> None:
    config = make(run)
    before = hashes(run.parent)
    with pytest.raises(PrismError, match=complaint):
        find_start(config, stage="align")
    assert hashes(run.parent) == before


def test_a_configuration_of_another_version_is_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2, config=None)
    damaged = tmp_path / "other"
    folder = write_checkpoint(damaged, 2)
    state = json.loads((folder / "state.json").read_text())
    state["state"]["config"]["new_section"] = {}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"step_000002 was saved with cannot be read: unknown key"):
        find_start(asked(load=damaged), stage="align")


def test_an_older_versions_checkpoint_is_held_to_the_file_beside_it(tmp_path: Path) -> None:
    """Claim: where the checkpoint does not say how its run was configured, the run's file does."""
    write_checkpoint(tmp_path, 2, name=None, config=None)
    assert find_start(asked(replace(SAVED, seed=9), load=tmp_path), stage="align").lines == []
    save(SAVED, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="--seed was 5 and is 9"):
        find_start(asked(replace(SAVED, seed=9), load=tmp_path), stage="align")


# What flags are laid over.


def test_a_bare_load_takes_the_runs_own_configuration(run: Path, tmp_path: Path) -> None:
    """Claim: nothing of the recipe that a new run would take is left, however the run is named."""
    for argv in (["--load", str(run)], ["--output", str(run), "--resume", "auto"], [f"--load={run}"]):
        assert defaults_of(argv, AlignConfig(), stage="align") == replace(SAVED, checkpoint=SAVED.checkpoint)
    yaml = tmp_path / "given.yaml"
    yaml.write_text(f"checkpoint: {{load: {run}}}\n")
    assert defaults_of(["--config", str(yaml)], AlignConfig(), stage="align") == SAVED


def test_what_belonged_to_one_command_is_not_taken_over(tmp_path: Path) -> None:
    was = replace(
        SAVED,
        checkpoint=CheckpointConfig(output=tmp_path / "moved", load=tmp_path, save_every=3),
        run=RunConfig(resume="auto", change=("seed",), max_minutes=5, report_every=7),
    )
    write_checkpoint(tmp_path, 2, config=was)
    found = defaults_of(["--load", str(tmp_path)], AlignConfig(), stage="align")
    assert found.checkpoint == CheckpointConfig(save_every=3)
    assert found.run == RunConfig(report_every=7)


@pytest.mark.parametrize("argv", [[], ["--output", "new", "--resume", "auto"], ["--load", "nowhere"], ["--seed", "3"]])
def test_a_run_that_begins_keeps_its_defaults(argv: list[str]) -> None:
    assert defaults_of(argv, MINI_ALIGN, stage="align") is MINI_ALIGN


def test_another_stages_run_is_refused_at_once(run: Path) -> None:
    with pytest.raises(CheckpointError, match="was saved by a run of align, and this is one of warm-start"):
        defaults_of(["--load", str(run)], WarmStartConfig(), stage="warm-start")


# What is written down.


def test_the_first_part_says_how_it_was_configured_and_later_ones_what_changed(run: Path) -> None:
    """Claim: what an earlier part was configured with is never overwritten."""
    first = (run / "config.yaml").read_bytes()
    same = asked(load=run, output=run)
    settle(same, find_start(same, stage="align"))
    assert [path.name for path in run.glob("config*")] == ["config.yaml"]
    more = asked(replace(SAVED, steps=20), load=run, output=run)
    start = find_start(more, stage="align")
    settle(more, start)
    settle(more, start)
    assert sorted(path.name for path in run.glob("config*")) == ["config-step_000004.yaml", "config.yaml"]
    assert (run / "config.yaml").read_bytes() == first
    assert merge(AlignConfig(), read_yaml(run / "config-step_000004.yaml")).steps == 20


def test_a_try_without_a_checkpoint_is_begun_anew_as_it_was_configured(tmp_path: Path) -> None:
    """Claim: the command that a run is told to go on with is enough, also before its first checkpoint."""
    (tmp_path / "metrics.jsonl").touch()
    save(SAVED, tmp_path / "config.yaml")
    argv = ["--output", str(tmp_path), "--resume", "auto"]
    assert defaults_of(argv, AlignConfig(), stage="align") == SAVED
    assert defaults_of(argv, WarmStartConfig(), stage="warm-start") == WarmStartConfig(), "another stage's is none"
    assert defaults_of(argv[:2], AlignConfig(), stage="align") == AlignConfig()


def test_what_belongs_to_the_command_is_not_written_down(tmp_path: Path) -> None:
    """Claim: a saved configuration given by --config sends no run to another folder."""
    config = asked(output=tmp_path, resume="auto")
    settle(config, find_start(config, stage="align"))
    written = merge(AlignConfig(), read_yaml(tmp_path / "config.yaml"))
    assert (written.checkpoint.output, written.run.resume) == (None, "no")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "3"},
        {"seed": None},
        {"config": []},
        {"config": "x"},
        {"data": 3},
        {"run": 4},
        {"idle": None},
        {"kept": []},
    ],
)
def test_a_damaged_state_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 2)
    document = json.loads((folder / "state.json").read_text())
    document["state"] |= changes
    (folder / "state.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"step_000002 is damaged: its .*; remove it"):
        find_start(asked(load=tmp_path), stage="align")


def test_a_damaged_state_of_an_older_version_is_one_line(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 2)
    document = json.loads((folder / "state.json").read_text())
    document["state"] = {"step": 2, "seed": 5, "game": None}
    (folder / "state.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="keeps of the run is damaged"):
        find_start(asked(load=tmp_path), stage="align")


def test_a_damaged_record_is_refused_before_anything_is_written(run: Path) -> None:
    (run / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        find_start(asked(load=run), stage="align")


def test_a_runs_checkpoints_stand_for_the_run(run: Path) -> None:
    assert find_start(asked(load=run / "checkpoints"), stage="align").output == run
    assert find_start(asked(load=run / "checkpoints" / "step_000004"), stage="align").output is None


def test_a_new_folder_says_how_it_was_configured(tmp_path: Path, run: Path) -> None:
    config = asked(load=run, output=tmp_path / "new")
    start: Start = find_start(config, stage="align")
    (tmp_path / "new").mkdir()
    settle(config, start)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]
