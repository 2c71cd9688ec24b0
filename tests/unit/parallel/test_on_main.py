"""What the main rank does for all: its answer, or its error, is everybody's (one rank; several in ``distributed``)."""

from __future__ import annotations

import pytest

from prism_megatron.errors import ConfigError
from prism_megatron.parallel import collectives
from prism_megatron.parallel.collectives import on_main


def test_an_answer_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_megatron.parallel.collectives.dist.get_rank", lambda: 0)
    told: list[object] = []

    def broadcast(value: object, source: int) -> object:
        assert source == 0
        told.append(value)
        return value

    monkeypatch.setattr(collectives, "broadcast_object", broadcast)
    assert on_main(lambda: 3) == 3

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(ConfigError, match="bad"):
        on_main(lambda: fail(ConfigError("bad")))
    with pytest.raises(KeyError, match="cause"):
        on_main(lambda: fail(KeyError("cause")))
    assert len(told) == 3, "the other ranks hear of every error"


def test_other_ranks_do_nothing_and_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: an error that is none of ours ends the other ranks too, which would wait in a collective for ever."""
    monkeypatch.setattr("prism_megatron.parallel.collectives.dist.get_rank", lambda: 1)
    told: list[object] = [(3, None), (None, ConfigError("bad")), (None, RuntimeError("rank 0 failed: KeyError()"))]
    monkeypatch.setattr(collectives, "broadcast_object", lambda _value, source: told.pop(0))  # noqa: ARG005
    done: list[int] = []
    assert on_main(lambda: len(done)) == 3 and done == []
    with pytest.raises(ConfigError, match="bad"):
        on_main(lambda: None)
    with pytest.raises(RuntimeError, match="rank 0 failed"):
        on_main(lambda: None)
