"""The commands behind one word: ``python -m prism_megatron align --tp 4 --pp 2``."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from prism_megatron.terminal import guarded

COMMANDS = (
    "sft",
    "align",
    "rlvr",
    "warm-start",
    "convert",
    "serve",
    "verify",
    "make-random",
    "report",
    "data",
    "select-prompts",
    "verify-answers",
    "evaluate",
    "drift",
    "visual-reliance",
    "pipeline",
    "curate",
    "make-pairs",
    "plan",
)
"""Each is the module of that name in ``prism_megatron.commands``, and the console script ``prism-NAME``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the words to the command that the first one names; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, arguments = (words[0] if words else ""), words[1:]
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        print(_usage(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    status: int = importlib.import_module(_module(name)).main(arguments)
    return status


def _module(name: str) -> str:
    return f"prism_megatron.commands.{name.replace('-', '_')}"


def _usage() -> str:
    lines = [f"  {name:<12} {_summary(name)}" for name in COMMANDS]
    return "\n".join(["usage: python -m prism_megatron COMMAND [flags]; COMMAND --help lists the flags", *lines])


def _summary(name: str) -> str:
    """The first line of the command's docstring without its example; nothing is imported for it."""
    spec = find_spec(_module(name))
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].partition("``")[0].rstrip(" :")


if __name__ == "__main__":
    sys.exit(guarded(main))
