"""Garbage is collected at the steps that were asked for, and Python gets its own way back."""

from __future__ import annotations

import gc

import pytest

from prism_megatron.engine.host.garbage import GarbageCollection


def test_collections_happen_at_their_steps_and_never_between(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    collection = GarbageCollection()
    collection.begin(3)
    try:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
        counts = []
        for _ in range(7):
            collection.before_step()
            counts.append(len(collected))
        assert counts == [0, 0, 0, 1, 1, 1, 2]
    finally:
        collection.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    collection.close()


def test_without_a_number_of_steps_python_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: pytest.fail("nobody asked"))
    collection = GarbageCollection()
    collection.begin(0)
    assert gc.isenabled()
    collection.before_step()
    collection.close()
