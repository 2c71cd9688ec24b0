"""A step's command below the pipeline: it hears its signals, ends with it, and finds the package."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from prism_megatron.errors import RunStopped
from prism_megatron.pipeline import process
from prism_megatron.pipeline.process import Processes
from tests.conftest import REPOSITORY
from tests.waiting import wait_for


def script(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "command.py"
    path.write_text(textwrap.dedent(body))
    return [sys.executable, str(path)]


def later(heard: Path, *numbers: int) -> threading.Thread:
    """Signals to this process, each once the command has ``heard`` those before."""

    def send() -> None:
        for count, number in enumerate(numbers):
            wait_for(lambda: heard.exists() and heard.read_text() == "." * count)  # noqa: B023  # called at once
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


LISTENS = """
    import os, signal, sys, time
    heard = []
    file = open({heard!r} + ".part", "w")
    def hear(*_):
        heard.append(1)
        print(end=".", file=file, flush=True)
    signal.signal(signal.SIGTERM, hear)
    signal.signal(signal.SIGINT, lambda *_: None)
    os.rename(file.name, {heard!r})  # whoever sees it may send
    end = time.monotonic() + 60
    while len(heard) < {wanted} and time.monotonic() < end:
        time.sleep(0.02)
    sys.exit(3 if len(heard) == {wanted} else 7)
"""


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGTERM)])
def test_signals_are_passed_on(numbers: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the first and a later one. Here any later one is: what an echo is, the next test says."""
    monkeypatch.setattr(process, "_ECHO_SECONDS", 0.0)
    heard = tmp_path / "heard"
    with Processes() as processes:
        thread = later(heard, *numbers)
        status = processes.run(script(tmp_path, LISTENS.format(heard=str(heard), wanted=len(numbers))))
        thread.join()
        assert status == 3 and processes.heard == numbers[0]
        with pytest.raises(RunStopped, match="before it began"):
            processes.run([sys.executable, "-c", "raise SystemExit(5)"])


@pytest.mark.parametrize(("seconds", "sent"), [(3600.0, 1), (0.0, 2)])
def test_a_signal_that_comes_twice_at_once_came_once(
    seconds: float, sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a terminal and a launcher both send a Ctrl-C; one that comes later is another one."""
    monkeypatch.setattr(process, "_ECHO_SECONDS", seconds)
    passed_on: list[int] = []
    with Processes() as processes:
        processes._process = SimpleNamespace(send_signal=passed_on.append)  # type: ignore[assignment]
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        processes._process = None
    assert passed_on == [signal.SIGTERM] * sent


def test_statuses_come_back(tmp_path: Path) -> None:
    with Processes() as processes:
        assert processes.run([sys.executable, "-c", "raise SystemExit(4)"]) == 4
        assert processes.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -signal.SIGKILL
        with pytest.raises(OSError, match="absent"):
            processes.run([str(tmp_path / "absent")])


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Processes():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_package_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    code = "import prism_megatron, os, sys; sys.exit('/elsewhere' not in os.environ['PYTHONPATH'])"
    with Processes() as processes:
        assert processes.run([sys.executable, "-c", code]) == 0


def test_a_launcher_beside_python_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: also where no environment is activated."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with Processes() as processes:
        assert (
            processes.run([Path(sys.executable).name, "-c", f"import sys; sys.exit(sys.prefix != {sys.prefix!r})"]) == 0
        )


def test_a_command_does_not_outlive_a_killed_pipeline(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    words = script(tmp_path, f"""
        import os, pathlib, time
        pathlib.Path({str(ready)!r}).write_text(str(os.getpid()))
        time.sleep(60)  # until it is ended
        """)  # fmt: skip
    code = f"from prism_megatron.pipeline.process import Processes\nwith Processes() as one: one.run({words!r})"
    above = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        wait_for(lambda: ready.exists() and bool(ready.read_text()))
        below = int(ready.read_text())
        assert psutil.pid_exists(below)
        above.kill()
        above.wait()
        wait_for(lambda: not psutil.pid_exists(below) or psutil.Process(below).status() == psutil.STATUS_ZOMBIE)
    finally:
        above.kill()
