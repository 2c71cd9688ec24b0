"""Servers that a run did not start: one that is lost is left out, and used again once it has the weights in use.

Until none is left, which ends the run after a stated wait. Blind to real servers, for which ``tests/sglang`` is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism_megatron.errors import RolloutError, WeightSyncError
from prism_megatron.rollout.sglang.engine import SGLangRollout
from prism_megatron.rollout.sglang.weights import Transport
from prism_megatron.types import Prompt
from tests.unit.rollout.attached import attached, draw
from tests.unit.rollout.fake_sglang import FakeSGLang
from tests.unit.rollout.weight_servers import BY_GROUP, BY_TENSOR, VISION, announced, assert_holds
from tests.waiting import wait_for

PROMPT = Prompt("probe", (5, 6, 7), (), "")


def engine_on(fakes: list[FakeSGLang], spool: Path, **options: Any) -> SGLangRollout:
    return attached(fakes, spool, **{"poll_seconds": 0.01, **options})


def wait_until_back(engine: SGLangRollout, times: int = 1) -> None:
    wait_for(lambda: engine.took_back == times)


@pytest.mark.parametrize(
    ("transport", "path"),
    [
        ("tensor", "/pause_generation"),
        ("tensor", BY_TENSOR),
        ("tensor", "/end_weight_update"),
        ("disk", "/update_weights_from_disk"),
        ("group", BY_GROUP),
    ],
)
def test_a_server_that_dies_in_an_update_is_left_out_until_it_is_back(
    transport: Transport, path: str, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Claim: the update goes through on the other, further ones too; back, it has the newest before it is used."""
    engine = engine_on(fakes, tmp_path, transport=transport)
    engine.update_weights(announced(2.0), 1)
    fakes[1].die_at = path
    engine.update_weights(announced(3.0), 2)
    assert engine.policy_version == 2 and engine.out == {fakes[1].url}
    calls = len(fakes[1].calls)
    engine.update_weights(announced(4.0), 3)
    assert_holds(fakes[0], 4.0, 3)
    assert {rollout.policy_version for (rollout,) in draw(engine, count=6)} == {3}
    assert engine.score(PROMPT, (6,)).keys() == {fakes[0].url}
    assert "/pause_generation" not in fakes[1].paths()[calls:], "an update asked a server that is left out"
    fakes[1].restart()
    wait_until_back(engine)
    assert_holds(fakes[1], 4.0, 3)
    assert not engine.out and engine.score(PROMPT, (6,)).keys() == {fake.url for fake in fakes}
    engine.update_weights(announced(5.0), 4)
    for fake in fakes:
        assert_holds(fake, 5.0, 4)
    engine.close()
    told = (tmp_path / "servers.log").read_text()
    assert f"{fakes[1].url} is lost" in told and f"{fakes[1].url} is back, with version 3" in told


def test_a_server_that_was_restarted_unnoticed_gets_the_weights_in_use(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """It has those of its folder until then, with which nothing is drawn."""
    engine = engine_on(fakes, tmp_path)
    engine.update_weights(announced(2.0), 1)
    fakes[1].restart()
    wait_until_back(engine)
    assert_holds(fakes[1], 2.0, 1)
    engine.update_weights(announced(3.0, left_out=VISION), 2)
    vision = next(iter(VISION))
    for fake in fakes:
        assert (fake.weights[vision] == fakes[0].weights[vision]).all() and fake.version == "2"
    engine.close()


def test_a_server_of_another_trainer_is_left_alone(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """Claim: two trainers that share a server by mistake are told, and do not take it from one another for ever."""
    engine = engine_on(fakes[:1], tmp_path)
    engine.update_weights(announced(2.0), 1)
    pushed = fakes[0].paths().count(BY_TENSOR)
    fakes[0].version = "9"
    with pytest.raises(RolloutError, match="does another trainer update it"):
        draw(engine)
    with pytest.raises(RolloutError, match="does not hold version 1"):
        engine.score(PROMPT, (6,))
    assert fakes[0].paths().count(BY_TENSOR) == pushed
    engine.close()


def test_what_is_back_with_other_weights_is_not_used(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """Claim: the checksum of what it took is compared with the others' before it goes on; it is tried again."""
    engine = engine_on(fakes, tmp_path)
    engine.update_weights(announced(2.0), 1)
    fakes[1].die_at = "/pause_generation"
    engine.update_weights(announced(3.0), 2)
    name, tensor = fakes[1].weights.popitem()
    fakes[1].die_at, fakes[1].dead = None, False
    fakes[1].weights["of another model"] = tensor
    log = tmp_path / "servers.log"
    wait_for(lambda: log.exists() and "hold different weights" in log.read_text())
    assert engine.out == {fakes[1].url} and engine.took_back == 0
    fakes[1].weights[name] = fakes[1].weights.pop("of another model")
    wait_until_back(engine)
    assert_holds(fakes[1], 3.0, 2)
    engine.close()


def test_another_model_in_its_place_gets_no_weights(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    engine = engine_on(fakes, tmp_path)
    engine.update_weights(announced(2.0), 1)
    fakes[1].die_at = "/pause_generation"
    engine.update_weights(announced(3.0), 2)
    fakes[1].num_layers = 5
    fakes[1].restart()
    log = tmp_path / "servers.log"
    wait_for(lambda: log.exists() and "serves another model" in log.read_text())
    assert fakes[1].version == "default" and fakes[1].url in engine.out
    engine.close()


def test_without_any_server_the_run_ends_after_the_stated_wait(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """An update finds none and is kept for whoever comes back; who asks waits, and is told."""
    engine = engine_on(fakes, tmp_path, return_seconds=0.2, seconds=60.0)
    engine.update_weights(announced(2.0), 1)
    for fake in fakes:
        fake.die_at = "/pause_generation"
    engine.update_weights(announced(3.0), 2)
    with pytest.raises(RolloutError, match=r"no server of --rollout-urls \(.*\) has answered for 0 s"):
        draw(engine)
    with pytest.raises(RolloutError, match="none has scored"):
        engine.score(PROMPT, (6,))
    fakes[0].restart()
    wait_until_back(engine)
    assert_holds(fakes[0], 3.0, 2)
    assert draw(engine)[0][0].policy_version == 2
    engine.close()


def test_a_server_that_returns_in_time_answers_what_waited(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    engine = engine_on(fakes[:1], tmp_path, return_seconds=60.0)
    engine.update_weights(announced(2.0), 1)
    fakes[0].restart()
    fakes[0].answer_status = [0] * 8
    assert draw(engine)[0][0].policy_version == 1
    assert len([path for path in fakes[0].paths() if path == "/generate"]) > 8
    engine.close()


def test_a_server_that_refuses_an_update_is_a_failure_still(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """Only what is lost is left out: one that is there and says no has something wrong that a person must see."""
    engine = engine_on(fakes, tmp_path)
    engine.update_weights(announced(2.0), 1)
    fakes[1].refuse[BY_TENSOR] = 1
    with pytest.raises(WeightSyncError, match="was refused"):
        engine.update_weights(announced(3.0), 2)
    assert engine.policy_version == 1 and not engine.out
    engine.close()
