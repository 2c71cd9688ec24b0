"""What is played and what is left alone, with tools that compute nothing (real ones: tests/integration)."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest

from prism_megatron.errors import ConfigError, DataError, RunStopped
from prism_megatron.pipeline import play
from prism_megatron.pipeline.play import StepFailed
from prism_megatron.pipeline.state import STATE, State
from prism_megatron.run.alone import alone_in
from prism_megatron.run.folder import left_in, move_aside
from tests.unit.pipeline.fakes import STEPS, FakeProcesses, Home

ALL = [
    "evaluations/base", "stages/teach", "evaluations/teach", "stages/judge", "stages/play", "evaluations/play",
    "stages/choose", "stages/reward", "evaluations/reward",
]  # fmt: skip


def test_everything_is_played_once_in_order(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.play() == ALL
    assert home.play() == []
    assert [line for line in home.lines if "done before" in line] == [
        f"{'stage' if one.startswith('stages') else 'evaluation of'} {one.partition('/')[2]}: done before"
        for one in ALL
    ]


def test_what_stages_start_from_is_what_was_made(tmp_path: Path) -> None:
    """Claim: the model, discriminator and prompts that a stage reads are those of the stages that it names."""
    home = Home(tmp_path)
    home.play()
    config = (home.output / "configs" / "stages-reward.yaml").read_text()
    assert str(home.output / "stages" / "play") in config and "chosen.jsonl" in config
    assert str(home.output / "stages" / "judge") in (home.output / "configs" / "stages-play.yaml").read_text()


def changed(old: str, new: str) -> str:
    assert STEPS.count(old) == 1
    return STEPS.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("steps: 7", "steps: 8", ALL[7:]),
        ("steps: 5", "steps: 6", ALL[4:]),
        ("steps: 3", "steps: 4", ALL[1:]),
        ('tool: warm\n    model: {model: "@teach"}', 'tool: warm\n    model: {model: "@teach"}\n    lr: 2', ALL[3:]),
        ("tool: choose", "tool: choose\n    seed: 2", [ALL[6], *ALL[7:]]),
        ("tool: choose", "tool: choose\n    keep: 0.25", [ALL[6], *ALL[7:]]),
        ("steps: 7", "steps: 7\n    ranks: 2", []),
        ("scenes: 4", "scenes: 5", [one for one in ALL if one.startswith("evaluations")]),
        ("shown: 2", "shown: 3", []),
    ],
)
def test_a_changed_section_replays_that_step_and_those_that_use_it(
    old: str, new: str, again: list[str], tmp_path: Path
) -> None:
    """Claim: and no other; settings that train nothing replay nothing."""
    home = Home(tmp_path)
    home.play()
    home.text = changed(old, new)
    assert home.play() == again
    assert home.play() == []


def test_what_is_replayed_starts_in_an_empty_folder(tmp_path: Path) -> None:
    """Claim: what other settings made is kept aside; a choice among what is known is made in the same folder."""
    home = Home(tmp_path)
    home.play()
    made = (home.output / "stages" / "play" / "made").read_text()
    home.text = changed("steps: 5", "steps: 6")
    home.play()
    assert (home.output / "stages" / "play" / "earlier-1" / "made").read_text() == made
    assert (home.output / "stages" / "play" / "made").read_text() != made
    assert not (home.output / "stages" / "teach" / "earlier-1").exists()
    home.text = home.text.replace("tool: choose", "tool: choose\n    keep: 0.25")
    home.play()
    assert [path.name for path in (home.output / "stages" / "choose").glob("earlier-*")] == ["earlier-1"]


@pytest.mark.parametrize("name", ["stages/play", "evaluations/play"])
@pytest.mark.parametrize("moved", [1, None])
def test_a_step_that_a_kill_left_half_moved_aside_is_not_done(
    moved: int | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: also where the file is again what it was; what is left of it is never gone on with."""
    home = Home(tmp_path)
    home.play()
    before, result = home.text, home.report()
    made = (home.output / name / "summary.json").read_text()

    def killed(folder: Path) -> Path:
        if f"{folder.parent.name}/{folder.name}" == name:
            (folder / "earlier-1").mkdir()
            for path in sorted(left_in(folder), key=lambda one: one.name)[:moved]:
                path.rename(folder / "earlier-1" / path.name)
            raise KeyboardInterrupt
        return move_aside(folder)

    home.text = changed("steps: 5", "steps: 6")
    with monkeypatch.context() as patched:
        patched.setattr(play, "move_aside", killed)
        with pytest.raises(KeyboardInterrupt):
            home.play()
    home.text = before
    again = home.play()
    assert name in again
    left = home.output / name / ("earlier-2" if moved else "earlier-1")
    assert left.is_dir() and (home.output / name / "summary.json").read_text() == made
    assert home.report() == result


def test_what_is_made_again_in_the_same_folder_is_not_done_by_an_old_summary(tmp_path: Path) -> None:
    """Claim: a command that ends with status 0 because others have stopped it, as under torchrun, left the old one."""
    home = Home(tmp_path)
    home.play()
    home.text = changed("tool: choose", "tool: choose\n    keep: 0.25")
    processes = FakeProcesses(ends={"stages/choose": 0})
    with pytest.raises(StepFailed, match="stage choose was stopped before its end"):
        home.play(processes)
    assert home.play() == ALL[6:]


def test_a_step_without_its_result_is_made_anew(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.play()
    (home.output / "stages" / "judge" / "summary.json").unlink()
    assert home.play() == ["stages/judge"]


def test_a_replayed_pipeline_is_that_of_a_fresh_folder(tmp_path: Path) -> None:
    """Claim: report and results are the same, whatever was there before."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = Home(tmp_path / "one"), Home(tmp_path / "two", changed("steps: 5", "steps: 6"))
    one.play()
    one.text = two.text
    one.play()
    two.play()
    assert one.report() == two.report()


def test_data_that_changed_replay_what_reads_them(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    lines = tmp_path / "set" / "data.jsonl"
    lines.write_text('{"answer": 3}\n')
    home = Home(tmp_path, changed("steps: 7", f"steps: 7\n    data: {tmp_path / 'set'}"))
    home.play()
    lines.write_text('{"answer": 5}\n')
    assert home.play() == ALL[7:]


@pytest.mark.parametrize(("status", "own"), [(2, 2), (4, 4), (1, 1), (-9, 1)])
def test_a_step_that_fails_ends_the_pipeline_with_its_status(status: int, own: int, tmp_path: Path) -> None:
    """Claim: the next try begins with it, and goes on in the same folder."""
    home = Home(tmp_path)
    processes = FakeProcesses(ends={"stages/play": status})
    with pytest.raises(StepFailed, match=r"stage play .*--resume auto") as caught:
        home.play(processes)
    assert caught.value.status == own
    assert processes.said == ALL[:5]
    assert home.play() == ALL[4:]
    assert not list((home.output / "stages" / "play").glob("earlier-*"))


def test_a_signal_ends_it_after_the_step_has_stopped(tmp_path: Path) -> None:
    """Claim: a step that ends with status 0 because it was asked to, as under torchrun, is not done."""
    home = Home(tmp_path)
    processes = FakeProcesses()

    def asked(name: str) -> None:
        if name == "stages/judge":
            processes.heard = signal.SIGTERM

    processes.before_end = asked
    with pytest.raises(RunStopped, match="SIGTERM in stage judge"):
        home.play(processes)
    assert home.play() == ALL[3:]


def test_a_step_that_was_stopped_by_others_is_not_done(tmp_path: Path) -> None:
    home = Home(tmp_path)

    def stopped(name: str) -> None:
        if name == "stages/judge":
            (home.output / name / "summary.json").write_text(json.dumps({"steps": 1, "ended": "stopped by SIGTERM"}))

    with pytest.raises(StepFailed, match="was stopped before its end") as caught:
        home.play(FakeProcesses(before_end=stopped))
    assert caught.value.status == 3
    assert home.play() == ALL[3:]


def test_a_folder_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.play()
    (home.output / "evaluations" / "teach").rename(tmp_path / "elsewhere")
    assert home.play() == ["evaluations/teach"]


def test_until_and_from(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.play(until="judge") == ALL[:4]
    assert home.report()["left"] == []
    home.text = changed("steps: 3", "steps: 4")
    assert home.play(from_="play") == ALL[4:]  # with what the shorter stage made
    assert home.play(from_="play") == []
    assert home.play() == ALL[1:]


def test_from_needs_what_comes_before(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.play(until="teach")
    with pytest.raises(ConfigError, match="stage judge is not done"):
        home.play(from_="play")


def test_state_is_whole_or_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.play(until="teach")
    (home.output / STATE).write_text('{"stages/teach": {"work": "a"}}')
    with pytest.raises(DataError, match="is damaged"):
        State(home.output)


def test_a_folder_without_its_state_is_moved_aside(tmp_path: Path) -> None:
    """Claim: nobody knows what its runs were of."""
    home = Home(tmp_path)
    home.play(until="teach")
    (home.output / STATE).unlink()
    assert home.play(until="teach") == ALL[:3]
    assert (home.output / "stages" / "teach" / "earlier-1").is_dir()


def test_two_pipelines_do_not_share_a_folder(tmp_path: Path) -> None:
    mine = partial(alone_in, command="prism-pipeline")
    with mine(tmp_path), pytest.raises(ConfigError, match="another prism-pipeline"), mine(tmp_path):
        pass
    with mine(tmp_path):
        pass
