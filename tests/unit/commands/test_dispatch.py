"""``python -m prism_megatron`` and the console scripts lead to the same commands as ``tools/``."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prism_megatron
from prism_megatron.__main__ import COMMANDS, main
from prism_megatron.commands import convert
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from tests import hub_cache
from tests.conftest import REPOSITORY

POLICY = MINI_FOLDER / "policy"


def test_every_command_is_a_module_with_a_main() -> None:
    stems = {path.stem for path in (REPOSITORY / "prism_megatron" / "commands").glob("*.py")}
    helpers = {"__init__"}
    assert {name.replace("-", "_") for name in COMMANDS} == stems - helpers
    for name in COMMANDS:
        assert callable(importlib.import_module(f"prism_megatron.commands.{name.replace('-', '_')}").main)


def test_setup_names_every_command_and_the_version() -> None:
    """Blind spot: what setuptools makes of it (``tests/integration/test_wheel.py``)."""
    text = (REPOSITORY / "setup.py").read_text()
    (names,) = re.findall(r"for name in \((.*?)\)", text, re.DOTALL)
    assert [name.replace("_", "-") for name in re.findall(r'"(\w+)"', names)] == list(COMMANDS)
    assert prism_megatron.__version__


def test_the_first_word_is_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "inspect", str(POLICY)]) == 0
    assert "Hugging Face model folder" in capsys.readouterr().out
    assert main(["align", "--tp", "3", "--model", str(POLICY)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --tp 3") and said.count("\n") == 1


def test_the_usage_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in COMMANDS:
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {name} ")]
        assert len(line.removeprefix(f"  {name}").strip()) > 20
    for words in ([], ["aling"]):
        assert main(words) == 2
        assert capsys.readouterr().err == said
    assert convert.main([]) == 2


def test_a_tool_of_a_checkout_does_what_the_command_does(tmp_path: Path) -> None:
    """Claim: from another folder, and with a hub id from the cache that the environment names."""
    hub_cache.put(tmp_path / "home" / "hub", "org/name", POLICY)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in environment.items() if key not in ("PYTHONPATH", "HF_HUB_CACHE")}

    def said(start: list[str], **more: str) -> str:
        done = subprocess.run(
            [*start, "inspect", "org/name"], cwd=tmp_path, env=environment | more, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    by_tool = said([sys.executable, str(REPOSITORY / "tools" / "convert.py")])
    assert by_tool == said([sys.executable, "-m", "prism_megatron", "convert"], PYTHONPATH=str(REPOSITORY))
    assert "Hugging Face model folder" in by_tool
