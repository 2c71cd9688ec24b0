"""The examples of docs/data.md are the inputs here: each is written as it stands there, and read as it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron.commands.data import main
from prism_megatron.config.formats import FORMAT_NAMES
from prism_megatron.data.conversation import Conversation
from tests.conftest import REPOSITORY
from tests.unit.data.formats.sets import png, read_set, seen

TEXT = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
FILE = re.compile(r"<!-- file: (\S+) -->\n```json\n(.*?)```", re.DOTALL)
RUN = re.compile(r"<!-- run: (\S+) -->\n```(python|bash)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^prism-data check (\S+)( --plain-answers)?$", re.MULTILINE)
TAGGED = "<caption>\n- two red circles\n</caption>\n<think>\nOne is left, one is right.\n</think>\n<answer>2</answer>"


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example of each format in a folder of its name."""
    pytest.importorskip("pyarrow")
    root = tmp_path_factory.mktemp("examples")
    for name in FORMAT_NAMES:
        (root / name / "images").mkdir(parents=True)
        (root / name / "images" / "17.png").write_bytes(png(17))
    for path, text in FILE.findall(TEXT):
        (root / path).write_text(text, encoding="utf-8")
    programs = root / "bin"
    programs.mkdir()
    (programs / "prism-data").write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tools/data.py "$@"\n')
    (programs / "prism-data").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    for name, language, text in RUN.findall(TEXT):
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
        subprocess.run(command, cwd=root / name, check=True, env={**os.environ, "PATH": path}, timeout=120)
        if name == "webdataset":
            (root / name / "000017.json").unlink()
    return root


def commands() -> dict[str, tuple[str, bool]]:
    """What the page says to check: by format, the path and whether plain answers are asked for."""
    return {Path(path).parts[0]: (path, bool(plain)) for path, plain in COMMAND.findall(TEXT)}


def test_every_format_has_an_example() -> None:
    made = {Path(path).parts[0] for path, _ in FILE.findall(TEXT)} | {name for name, _, _ in RUN.findall(TEXT)}
    assert made == set(FORMAT_NAMES) == set(commands())
    for name in FORMAT_NAMES:
        assert f"\n## {name}\n" in TEXT and f"| `{name}` |" in TEXT


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_an_example_is_read(name: str, examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: without a format named, to one and the same conversation, but for what a format has no place for."""
    path, is_plain = commands()[name]
    arguments = ["check", str(examples / path), *(["--plain-answers"] if is_plain else [])]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{name}, 1 file" in said and "1: 1 good, 0 bad" in said
    (conversation,) = read_set(examples / path, plain_answers=is_plain)
    assert _texts(conversation) == [
        ("user", "How many red circles are there?"),
        ("assistant", "2" if is_plain else TAGGED),
    ]
    assert (conversation.source, conversation.answer) == ("mine", "2")
    assert [part.split()[0] for part in seen(conversation)[3][0][1]] == ["image", "text"]
    assert conversation.id == {"verl": "mine/train/17"}.get(name, "17") or name == "prism"


def _texts(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, "".join(part for part in turn.parts if isinstance(part, str))) for turn in conversation.turns]


def test_flags_of_the_page_exist(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for name in ("check", "stats", "convert", "shard", "energon-state"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        shown += capsys.readouterr().out
    lines = [line.partition("#")[0] for line in TEXT.splitlines() if line.startswith("prism-data")]
    flags = {word for line in lines for word in shlex.split(line) if word.startswith("--")}
    flags |= {
        "--format",
        "--columns",
        "--images",
        "--split",
        "--on-bad",
        "--require-tags",
        "--max-pixels",
        "--min-pixels",
    }
    flags |= {"--validation-share", "--ranks", "--workers"}
    assert all(flag in shown for flag in flags), [flag for flag in flags if flag not in shown]
