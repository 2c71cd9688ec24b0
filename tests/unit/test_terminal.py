"""How commands meet the terminal: readers that leave, encodings that lack characters, Ctrl-C at any moment.

Blind spot: a terminal; streams are pipes and files. Ctrl-C before Python has come to our first line is Python's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prism_megatron import terminal
from prism_megatron.__main__ import COMMANDS
from tests.conftest import REPOSITORY

HEARS_CTRL_C = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
"""A shell's background jobs, and what they start, ignore Ctrl-C."""
HEAD = "import sys, os, signal\nfrom prism_megatron.terminal import guarded, tolerate\n"
HELP = [
    *([sys.executable, "-m", "prism_megatron", name, "--help"] for name in COMMANDS),
    [sys.executable, "-m", "prism_megatron", "convert", "inspect", "--help"],
    [sys.executable, "-m", "prism_megatron", "--help"],
    *([sys.executable, str(path), "--help"] for path in sorted((REPOSITORY / "tools").glob("[a-z]*.py"))
      if path.name not in ("te_check.py", "parity.py")),
]  # fmt: skip


def named(command: Sequence[str]) -> str:
    return " ".join(Path(word).name for word in command[1:])


def said(code: str, *, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """What a program that ``code`` is, after its imports, says and ends with."""
    return subprocess.run(
        [sys.executable, "-c", HEARS_CTRL_C, sys.executable, "-c", HEAD + code],
        cwd=REPOSITORY, env=environment(), text=True, timeout=120, check=False, stdout=stdout, stderr=subprocess.PIPE,
    )  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}


INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"
TROUBLES = {
    "plain": INTERRUPT,
    "as an import error": f"""
    try:
        {INTERRUPT}
    except KeyboardInterrupt as error:
        raise ImportError("half a library") from error""",
    "behind another error": f"""
    try:
        {INTERRUPT}
    finally:
        raise RuntimeError("a cleanup failed")""",
    # A finaliser cannot raise: the signal is heard again.
    "in a finaliser": f"""
    class Last:
        def __del__(self):
            {INTERRUPT}
            sum(range(9))
    Last()
    import time
    time.sleep(60)  # until the signal comes again""",
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
def test_ctrl_c_is_one_line_and_130(trouble: str) -> None:
    done = said(f"def main():\n    {trouble}\n    return 0\nsys.exit(guarded(main))")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_other_errors_keep_their_traceback_and_status() -> None:
    done = said("def main():\n    raise RuntimeError('a bug')\nsys.exit(guarded(main))")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "a bug" in done.stderr
    assert said("sys.exit(guarded(lambda: 3))").returncode == 3


def test_ranks_of_torchrun_leave_the_line_to_the_first() -> None:
    done = said("os.environ['RANK'] = '1'\nsys.exit(guarded(lambda: signal.raise_signal(signal.SIGINT)))")
    assert (done.returncode, done.stderr) == (130, "")


def test_the_work_goes_on_without_a_reader(tmp_path: Path) -> None:
    """Claim: whoever closes the pipe of a command loses its words, and the command neither its work nor its status."""
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "def main():\n    for n in range(5000): print(n, flush=n % 2 == 0)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n    return 4\nsys.exit(guarded(main))"
    )
    try:
        done = said(code, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (4, "")
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_could_not_be_written_is_a_failure() -> None:
    with Path("/dev/full").open("w") as full:
        done = said("sys.exit(guarded(lambda: print('x')))", stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: No space left on device\n")


def test_a_stream_that_was_closed_leads_nowhere(tmp_path: Path) -> None:
    """Claim: and a file that is opened later does not take its place."""
    path = tmp_path / "file"
    code = (
        f"os.close(1); sys.stdout = None\ntolerate()\nwith open({str(path)!r}, 'w') as f: print('x'); os.write(1, b'y')"
    )
    done = said(code)
    assert (done.returncode, done.stderr, path.read_text()) == (0, "", "")


@pytest.mark.parametrize("command", HELP, ids=named)
def test_help_is_printed_in_any_encoding_and_to_nobody(command: list[str]) -> None:
    """Claim: replacement characters, and silence; of every command and tool."""
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(PYTHONIOENCODING="ascii"), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii() and b"usage" in done.stdout.lower()
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment(), stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "module",
    ["yaml", "tyro", "prism_megatron.run.start", "numpy", "torch", "megatron.core", "transformers.utils"],
)
def test_ctrl_c_is_heard_while_modules_load(module: str, tmp_path: Path) -> None:
    """Claim: just after any of these was loaded, by a run of one rank. Blind spot: the moments between."""
    with subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, sys.executable, "-X", "importtime", "tools/run_align.py", "--output",
         str(tmp_path / "run")],
        cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            assert any(line.split("|")[-1].strip() == module for line in process.stderr), "it was never loaded"
            process.send_signal(signal.SIGINT)
            errors = process.stderr.read()  # behind what was read: communicate would lose what is buffered
            process.wait(timeout=120)
        finally:
            process.kill()
    assert [line for line in errors.splitlines() if not line.startswith("import time:")] == ["interrupted"]
    assert process.returncode == 130


def test_every_tool_and_script_enters_by_one_door() -> None:
    """Claim: what a user starts is guarded: console scripts, ``python -m`` and every file of ``tools/``."""
    for path in sorted((REPOSITORY / "tools").glob("*.py")):
        assert re.search(r"sys\.exit\((run\(\"|guarded\()", path.read_text(encoding="utf-8")), path
    assert "prism_megatron.terminal:{name}" in (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert callable(getattr(terminal, name.replace("-", "_")))
