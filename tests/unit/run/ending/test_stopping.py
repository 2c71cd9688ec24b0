"""Signals are wishes; a second one ends the process as it always did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from prism_megatron.parallel import collectives
from prism_megatron.run.ending import stopping
from prism_megatron.run.ending.stopping import Stopping


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "all_gather_objects", lambda value: [value])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish_inside_and_what_it_was_outside(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Stopping() as own:
        assert own.agreed() is None
        signal.raise_signal(number)
        assert own.agreed() == number.name
    assert signal.getsignal(number) is before


def test_the_first_rank_that_wishes_speaks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: one rank's wish is everybody's, also of ranks that heard nothing."""
    monkeypatch.setattr(collectives, "all_gather_objects", lambda _own: [None, "SIGTERM", "SIGINT"])
    assert Stopping().agreed() == "SIGTERM"


def test_time_is_up_when_it_is_up() -> None:
    now = [stopping._began()]
    own = Stopping(2.0, clock=lambda: now[0])
    now[0] += 119.0
    assert own.wish is None
    now[0] += 1.0
    assert own.wish == "--max-minutes 2"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """Claim: ranks whose launcher answers Ctrl-C for them are not asked twice."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopping() as own:
            os.kill(os.getpid(), signal.SIGINT)
            assert own.wish is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_threads_take_no_signals() -> None:
    seen: list[Any] = []

    def enter() -> None:
        with Stopping() as own:
            seen.append(own.wish)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]


SCRIPT = """
import signal, time
from prism_megatron.run.ending.stopping import Stopping
now = [0.0]
with Stopping(clock=lambda: now[0]):
    signal.raise_signal(signal.{name})
    now[0] = {later}
    print("once", flush=True)
    signal.raise_signal(signal.{name})
    print("twice", flush=True)
"""


@pytest.mark.parametrize(("later", "survives"), [(0.5, True), (1.0, False)])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process_at_once(name: str, later: float, survives: bool) -> None:
    """Claim: an echo of the first within a second is not a second one."""
    script = SCRIPT.format(name=name, later=later)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "once" in result.stdout
    assert ("twice" in result.stdout) is survives
    assert result.returncode == (0 if survives else -getattr(signal, name)), result.stderr
