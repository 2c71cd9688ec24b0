"""Files and folders that stay have the mode that the umask gives, whoever writes them.

Blind spot: access lists and group bits of folders, which the kernel applies by itself where a file is made plainly.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.merge import save
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig
from prism_megatron.conversion.hf.writer import write_hf_folder
from prism_megatron.disk import folder_beside, open_to_umask, write_atomically
from prism_megatron.jobs.convert import to_hf, to_megatron
from tests.conftest import REPOSITORY

POLICY = MINI_FOLDER / "policy"
UMASKS = (0o027, 0o077, 0o002)


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(root: Path, umask: int) -> None:
    """Of ``root`` and all in it."""
    everything = [root, *(root.rglob("*") if root.is_dir() else ())]
    wrong = {
        str(path.relative_to(root)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in everything
        if (path.is_file() and stat.S_IMODE(path.stat().st_mode) != 0o666 & ~umask)
        or (path.is_dir() and stat.S_IMODE(path.stat().st_mode) & 0o777 != 0o777 & ~umask)
    }
    assert everything and not wrong


def converted(folder: Path) -> None:
    to_megatron(ToMegatronConfig(hf=str(POLICY), save=str(folder / "checkpoint")), say=lambda _: None)
    to_hf(ToHFConfig(load=str(folder / "checkpoint"), save=str(folder / "hf")), say=lambda _: None)


WRITERS: dict[str, Callable[[Path], None]] = {
    "settings": lambda folder: save(AlignConfig(), folder / "config.yaml"),
    "text": lambda folder: write_atomically(folder / "file", "text"),
    "a model": lambda folder: write_hf_folder(folder / "hf", [("a", torch.ones(2))], like=POLICY),
    "a model in shards": lambda folder: write_hf_folder(
        folder / "hf", [("a", torch.ones(2)), ("b", torch.ones(2))], like=POLICY, max_shard_bytes=8
    ),
    "conversions": converted,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_what_is_written_has_the_mode_of_the_umask(write: Callable[[Path], None], umask: int, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder)
    assert len(list(folder.rglob("*"))) > 0
    assert_modes(folder, umask)


def test_a_file_of_a_library_is_opened_to_the_umask(umask: int, tmp_path: Path) -> None:
    folder = folder_beside(tmp_path / "model")
    (folder / "private").touch(mode=0o600)
    open_to_umask(folder / "private")
    assert_modes(folder, umask)
    assert folder.parent == tmp_path and folder.name.startswith(".model.")
    assert folder_beside(tmp_path / "model") != folder


@pytest.mark.parametrize(
    "umask_text", ["027", pytest.param("077", marks=pytest.mark.long), pytest.param("002", marks=pytest.mark.long)]
)
def test_all_files_of_a_run_have_the_mode_of_the_umask(umask_text: str, tmp_path: Path) -> None:
    """Claim: settings, rows, reports, checkpoint and export of a whole run on two ranks."""
    command = [
        sys.executable, "tools/run_align.py", "--steps", "1", "--prompts-per-step", "1", "--rollouts-per-prompt", "2",
        "--tp", "2", "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        ["sh", "-c", f'umask {umask_text}; exec "$@"', "sh", *command],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert names >= {"config.yaml", "metrics.jsonl", "report.html", "state.json", ".metadata", "model.safetensors"}
    assert_modes(tmp_path / "run", int(umask_text, 8))
