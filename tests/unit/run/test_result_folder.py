"""A command's own folder: nobody else's meanwhile, and no trace of a refused start. Blind spot: other processes, and
kills (``tests/integration/test_evaluate.py``)."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError, PrismError
from prism_megatron.run.alone import alone_in
from prism_megatron.run.result_folder import result_folder, session_in


def nothing() -> None:
    """Any folder will do."""


def refuse() -> None:
    raise ConfigError("not this one")


def test_a_folder_is_one_commands_at_a_time(world: World, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with result_folder(world, out, kind="evaluate", check=nothing) as folder:
        assert folder == out and folder.is_dir()
        second = result_folder(world, out, kind="evaluate", check=nothing)
        with pytest.raises(ConfigError, match=r"another prism-evaluate is at work in .*out; let it end, or give"):
            second.__enter__()
        assert out.is_dir(), "the folder of one that is at work is no refused start's to remove"
    with result_folder(world, out, kind="evaluate", check=nothing):
        pass


def test_it_is_looked_at_once_nobody_else_writes_there(world: World, tmp_path: Path) -> None:
    """Claim: between a look and the lock another command may have begun there."""
    seen: list[str] = []

    def look() -> None:
        with pytest.raises(ConfigError), alone_in(tmp_path, command="x"):
            pass
        seen.append("locked")

    with result_folder(world, tmp_path, kind="evaluate", check=look):
        assert seen == ["locked"]


def test_a_refused_start_leaves_no_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: one that was there stays, and so does one in which something was written."""
    monkeypatch.chdir(tmp_path)

    def refused(folder: Path, writes: bool) -> None:
        if writes:
            (folder / "answers.jsonl").touch()
        raise PrismError("no such thing")

    def ended(output: Path | None, *, writes: bool = False) -> Path:
        with pytest.raises(PrismError), result_folder(world, output, kind="evaluate", check=nothing) as folder:
            refused(folder, writes)
        return folder

    assert not ended(tmp_path / "new").exists()
    assert ended(None).parent == Path("runs") and not list(Path("runs").iterdir())
    assert ended(tmp_path / "written", writes=True).is_dir()
    (tmp_path / "there").mkdir()
    assert ended(tmp_path / "there").is_dir()
    with (
        pytest.raises(ConfigError, match="not this one"),
        result_folder(world, tmp_path / "checked", kind="evaluate", check=refuse),
    ):
        pass
    assert not (tmp_path / "checked").exists()


def test_a_file_system_without_locks_keeps_nobody_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: and stops nobody; any other trouble with a lock is not hidden."""

    def answers(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(fcntl, "flock", flock)

    answers(errno.ENOSYS)
    with result_folder(world, tmp_path, kind="evaluate", check=nothing):
        pass
    answers(errno.EBADF)
    with pytest.raises(OSError, match="no"), alone_in(tmp_path, command="x"):
        pass


def test_a_session_begins_and_closes(world: World, tmp_path: Path) -> None:
    with session_in(world, tmp_path) as session:
        session.open()
        session.say("here")
    assert "here" in (tmp_path / "console.log").read_text()
