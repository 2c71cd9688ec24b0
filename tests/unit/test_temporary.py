"""Folders of temporary files that are too long for sockets, or that take nothing."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import connection, util
from pathlib import Path

import pytest

from prism_megatron import temporary
from prism_megatron.errors import ConfigError
from prism_megatron.rollout.sglang.arguments import server_environment
from prism_megatron.temporary import LONGEST, folder_for_sockets, temporary_folder


def folder_of_length(parent: Path, length: int) -> Path:
    folder = parent / ("x" * (length - len(os.fsencode(parent)) - 1))
    folder.mkdir(parents=True)
    assert len(os.fsencode(folder)) == length
    return folder


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A folder whose name leaves room for longer ones; pytest's own may be long."""
    if len(os.fsencode(tmp_path)) < LONGEST - 1:
        return tmp_path
    return Path(tempfile.mkdtemp(dir="/tmp"))


@pytest.mark.parametrize(("beyond", "stays"), [(0, True), (1, False)])
def test_a_long_folder_gives_way_to_a_short_one(
    short: Path, beyond: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: up to the last byte that a socket's path can have, and from there on; SGLang's processes get the same."""
    asked = folder_of_length(short, LONGEST + beyond)
    monkeypatch.setattr(tempfile, "tempdir", str(asked))
    chosen = folder_for_sockets()
    assert (chosen == asked) == stays
    assert len(os.fsencode(chosen)) <= LONGEST
    assert server_environment({"TMPDIR": str(asked)}, tp=1, cuda=True)["TMPDIR"] == str(chosen)


def test_the_bound_is_that_of_the_fork_servers_socket(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the names that multiprocessing makes have just room in a folder of the longest name."""
    folder = folder_of_length(short, LONGEST)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    inner = tempfile.mkdtemp(prefix="pymp-")
    monkeypatch.setattr(util, "get_temp_dir", lambda: inner)
    assert len(os.fsencode(connection.arbitrary_address("AF_UNIX"))) == 107  # type: ignore[attr-defined]  # not in typeshed


def test_no_short_folder_is_one_line_that_names_tmpdir(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder_of_length(short, LONGEST + 1)))
    monkeypatch.setattr(temporary, "_SHORT", (short / "none",))
    with pytest.raises(ConfigError, match=r"^TMPDIR .* is too long .* set TMPDIR to a shorter folder$"):
        folder_for_sockets()


def test_no_folder_at_all_is_one_line_that_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(ConfigError, match=r"^TMPDIR /nonexistent takes no temporary files"):
        temporary_folder()
