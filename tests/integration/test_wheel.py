"""What is installed from a wheel runs away from the checkout: commands, and every file that they read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SMALL = ("--steps", "1", "--prompts-per-step", "2", "--rollouts-per-prompt", "2")


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | more
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_a_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    """Claim: ``prism-align`` plays a step of the mini world with what the wheel brought, and nothing of the checkout.

    Blind spot: the dependencies, which are those of this environment.
    """
    pytest.importorskip("setuptools")
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):  # a copy, so that no build folder is left in the checkout
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source, cwd=tmp_path)
    (wheel,) = wheels.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    packed = {str(path.relative_to(site)) for path in (site / "prism_megatron").rglob("*") if path.is_file()}
    tracked = {name for name in listed if name.startswith("prism_megatron/")}
    assert not tracked - packed
    said = run(site / "bin" / "prism-align", *SMALL, "--output", tmp_path / "run", cwd=tmp_path, PYTHONPATH=str(site))
    assert "done" in said
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
    where = run(
        sys.executable, "-c", "import prism_megatron; print(prism_megatron.__file__, prism_megatron.__version__)",
        cwd=tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert str(site) in where
    assert "unknown" not in where
    assert "usage" in run(sys.executable, "-m", "prism_megatron", "--help", cwd=tmp_path, PYTHONPATH=str(site))
