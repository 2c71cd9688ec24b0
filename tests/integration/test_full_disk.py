"""A disk that fills up is one line with the file and the command that goes on, and costs nothing that was whole before.

On a small tmpfs of the test's own; skipped where this user may not mount one. Blind spot: the spools of servers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prism_megatron.conversion.checkpoints.folder import read_checkpoint
from prism_megatron.observability.metrics import read_metrics
from tests.integration.test_resume import assert_same

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_align.py"
SMALL = ("--prompts-per-step", "2", "--rollouts-per-prompt", "2", "--dtype", "fp32")
MIB = 2**20

Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a disk of so many KiB, or gives the mounted one another size."""
    place = tmp_path / "disk"

    def sized(kib: int) -> Path:
        options = f"{'remount,' if place.exists() else ''}size={kib}k"
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a tmpfs")
        return place

    yield sized
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def told(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that a full disk ended."""
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "no space left on device" in line and "make room, then go on with `" in line
    return line


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, each saved, on a disk that had room for it."""
    output = tmp_path_factory.mktemp("roomy") / "run"
    result = run(*SMALL, "--steps", "3", "--save-every", "1", "--output", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    return output


@pytest.mark.long
def test_a_checkpoint_that_does_not_fit_leaves_the_others_whole(disk: Disk, roomy: Path) -> None:
    """Claim: its room is asked for before a byte is written, and with room the run ends as on a large disk."""
    size = size_of(roomy / "checkpoints" / "step_000001")
    output = disk((2 * size + size // 2) // 1024) / "run"
    line = told(run(*SMALL, "--steps", "3", "--save-every", "1", "--output", str(output)))
    assert f"{output}/checkpoints/step_000003 needs" in line
    assert f"--load {output}`" in line
    folders = sorted((output / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_000001", "step_000002"]
    for folder in folders:
        read_checkpoint(folder)
    disk(8 * size // 1024)
    result = run("--load", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(read_metrics(output / "metrics.jsonl"), read_metrics(roomy / "metrics.jsonl"))


def test_metrics_that_do_not_fit_end_the_run_in_a_line(disk: Disk) -> None:
    output = disk(64) / "run"
    line = told(run(*SMALL, "--steps", "400", "--save-every", "400", "--output", str(output)))
    assert f"--output {output} --resume auto`" in line, "nothing was saved yet"
    assert read_metrics(output / "metrics.jsonl"), "rows that were written are whole"


@pytest.mark.long
def test_an_export_that_does_not_fit_leaves_the_checkpoint(disk: Disk, roomy: Path) -> None:
    size = size_of(roomy / "checkpoints" / "step_000003")
    output = disk((size + MIB) // 1024) / "run"
    line = told(run(*SMALL, "--steps", "3", "--save-every", "3", "--output", str(output)))
    assert f"--load {output}`" in line
    assert not (output / "hf" / "config.json").exists() or not (output / "hf" / "model.safetensors").exists()
    disk(8 * size // 1024)
    result = run("--load", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    mine, theirs = (folder / "hf" / "model.safetensors" for folder in (output, roomy))
    assert mine.read_bytes() == theirs.read_bytes()
