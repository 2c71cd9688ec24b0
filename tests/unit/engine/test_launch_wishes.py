"""Signals to the command: passed on once, an echo is none, a second one ends all."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.engine import supervision
from prism_megatron.errors import RunStopped


def rank(sent: list[str], name: str, *, exitcode: int | None = None) -> Any:
    return SimpleNamespace(exitcode=exitcode, terminate=lambda: sent.append(name))


def test_the_first_is_passed_on_and_the_second_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(supervision.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    sent: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    wishes = supervision.Wishes([rank(sent, "0"), rank(sent, "1", exitcode=0)], 2)
    try:
        signal.raise_signal(signal.SIGTERM)
        assert sent == ["0"], "a rank that has ended hears nothing"
        now[0] += 0.5
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # which would end the tests
            pytest.fail("an echo is no second wish")
        assert sent == ["0"]
        now[0] += 0.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("a third breaks off what the second began")
        assert wishes.heard == signal.SIGTERM
        assert wishes.status_of(supervision.FAILURE) == 128 + signal.SIGTERM
        assert wishes.status_of(RunStopped.status) == RunStopped.status
    finally:
        wishes.forget()
    assert signal.getsignal(signal.SIGTERM) is before


def test_while_ranks_are_started_there_is_nothing_to_wait_for() -> None:
    wishes = supervision.Wishes([], 2)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        wishes.forget()
