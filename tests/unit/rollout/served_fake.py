"""An interpreter whose ``sglang`` is the fake server: in a process of its own, started as a run starts SGLang."""

from __future__ import annotations

import sys
from pathlib import Path

import tests

LAUNCH = """
import json, sys, threading

from tests.unit.rollout import fake_sglang
from tests.unit.rollout.fake_sglang import running

arguments = json.load(open(sys.argv[sys.argv.index("--config") + 1]))
fake_sglang.KEY = arguments["api-key"]
with running(498, host=arguments["host"], port=arguments["port"]):
    threading.Event().wait()  # until it is killed
"""


def fake_python(folder: Path) -> Path:
    """An interpreter, in ``folder``, that finds the fake as ``sglang``."""
    package = folder / "fake" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(LAUNCH)
    python = folder / "fake" / "python"
    root = Path(tests.__path__[0]).parent
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent}:{root} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python
