"""Colocated servers: memory is released while they are idle and paused, and never used before it holds weights again.

The fake server forgets its weights when it releases them, and dies of a call out of turn, as SGLang 0.5.23 does. Blind
to the memory itself and to CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prism_megatron.conversion.announced_weights import AnnouncedWeights
from prism_megatron.errors import RolloutError, WeightSyncError
from prism_megatron.rollout.sglang.engine import SGLangRollout
from tests.unit.rollout.attached import FakeSupervision, attached, draw
from tests.unit.rollout.fake_sglang import FakeSGLang
from tests.unit.rollout.weights import mini_weights

RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


@pytest.fixture
def fakes(fakes: list[FakeSGLang]) -> list[FakeSGLang]:
    """Those of all tests here, started so that they can release memory."""
    for fake in fakes:
        fake.saves_memory = True
    return fakes


@pytest.fixture
def engine(fakes: list[FakeSGLang], tmp_path: Path) -> Iterator[SGLangRollout]:
    engine = attached(fakes, tmp_path, colocated=True)
    yield engine
    engine.close()


def assert_holds(fakes: list[FakeSGLang], factor: float, version: int) -> None:
    expected = dict(mini_weights(factor))
    for fake in fakes:
        assert fake.version == str(version) and not fake.released and not fake.paused and not fake.session_open
        assert all(torch.equal(fake.weights[name], tensor) for name, tensor in expected.items())


def test_memory_is_released_when_idle_and_back_before_the_whole_update(
    engine: SGLangRollout, fakes: list[FakeSGLang]
) -> None:
    engine.sleep()  # before the first weights
    engine.update_weights(mini_weights(1.0), 1)
    with pytest.raises(WeightSyncError, match="released their memory; call wake"):
        draw(engine)
    engine.wake()
    draw(engine, count=4)
    engine.sleep()
    engine.sleep()
    assert all(fake.released and fake.paused for fake in fakes)
    engine.update_weights(mini_weights(2.0), 2)
    engine.wake()
    assert_holds(fakes, 2.0, 2)
    assert {rollout.policy_version for group in draw(engine, count=2) for rollout in group} == {2}
    for fake in fakes:
        paths = [path for path in fake.paths() if path not in ("/weights_checker", "/generate")]
        nap = ["/pause_generation", RELEASE, RESUME, "/pause_generation", "/begin_weight_update"]
        update = ["/update_weights_from_tensor", "/end_weight_update", RESUME, "/continue_generation"]
        assert paths == [*nap, *update] * 2
        regions = [body["tags"] for path, body in fake.calls if path in (RELEASE, RESUME)]
        assert regions == [["kv_cache", "weights"], ["weights"], ["kv_cache"]] * 2


def test_without_an_update_the_weights_there_were_come_back(engine: SGLangRollout, fakes: list[FakeSGLang]) -> None:
    engine.update_weights(mini_weights(1.5), 7)
    engine.sleep()
    with pytest.raises(WeightSyncError, match="released their memory; call wake"):
        draw(engine)
    engine.wake()
    assert_holds(fakes, 1.5, 7)
    assert draw(engine)[0][0].policy_version == 7


@pytest.mark.parametrize("path", ["/begin_weight_update", "/end_weight_update"])
def test_a_failed_update_does_not_leave_empty_memory_in_use(
    path: str, engine: SGLangRollout, fakes: list[FakeSGLang]
) -> None:
    """The first phase normally changes nothing, but here there is nothing left to keep."""
    engine.update_weights(mini_weights(1.0), 1)
    engine.sleep()
    fakes[1].refuse = {path: 1}
    with pytest.raises(WeightSyncError, match="was refused"):
        engine.update_weights(mini_weights(2.0), 2)
    engine.wake()
    assert_holds(fakes, 1.0, 1)
    assert draw(engine)[0][0].policy_version == 1


def test_when_nothing_can_be_handed_over_nothing_is_sampled(engine: SGLangRollout, fakes: list[FakeSGLang]) -> None:
    engine.update_weights(mini_weights(1.0), 1)
    engine.sleep()
    fakes[1].refuse = {"/begin_weight_update": 9}
    with pytest.raises(WeightSyncError, match="woke without weights"):
        engine.update_weights(mini_weights(2.0), 2)
    with pytest.raises(WeightSyncError, match="call update_weights first"):
        draw(engine)


def test_servers_that_slept_are_filled_whole(engine: SGLangRollout, fakes: list[FakeSGLang]) -> None:
    """Also by an update that leaves weights out, as one of a policy whose vision tower is frozen does; the servers
    still report the version that they had."""
    engine.update_weights(mini_weights(1.0), 1)
    engine.sleep()
    changed = {name: tensor for name, tensor in mini_weights(2.0) if ".visual." not in name}
    left_out = frozenset(name for name, _ in mini_weights() if ".visual." in name)
    shapes = {name: tuple(tensor.shape) for name, tensor in changed.items()}
    engine.update_weights(AnnouncedWeights(shapes, iter(changed.items()), left_out=left_out), 2)
    engine.wake()
    expected = dict(mini_weights(1.0)) | changed
    for fake in fakes:
        assert fake.version == "2" and all(torch.equal(fake.weights[name], expected[name]) for name in expected)


def test_when_the_weights_do_not_come_back_none_are_in_use(engine: SGLangRollout, fakes: list[FakeSGLang]) -> None:
    engine.update_weights(mini_weights(1.0), 1)
    engine.sleep()
    fakes[1].refuse = {"/begin_weight_update": 9}
    with pytest.raises(WeightSyncError, match="was refused"):
        engine.wake()
    assert engine.policy_version is None
    with pytest.raises(WeightSyncError, match="call update_weights first"):
        draw(engine)


def test_a_server_that_comes_back_while_the_others_sleep_sleeps_too(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    supervision = FakeSupervision(fakes)
    engine = attached(fakes, tmp_path, colocated=True, servers=supervision)
    engine.update_weights(mini_weights(2.0), 1)
    engine.sleep()
    fakes[1].restart()
    fakes[1].calls.clear()
    supervision.restarted(fakes[1].url)
    assert fakes[1].released and fakes[1].paths() == ["/pause_generation", RELEASE]
    assert fakes[0].paths()[-1] == RELEASE, "the other server is left alone"
    engine.wake()
    assert_holds(fakes, 2.0, 1)
    engine.close()


def test_a_server_that_is_started_anew_before_the_others_are_whole_is_whole_already(
    fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Claim: it gets the weights, and nothing is resumed there that was never released, which would end it."""
    supervision = FakeSupervision(fakes)
    engine = attached(fakes, tmp_path, colocated=True, servers=supervision)
    engine.update_weights(mini_weights(1.0), 1)
    engine.sleep()
    engine.update_weights(mini_weights(2.0), 2)
    fakes[1].restart()
    fakes[1].calls.clear()
    supervision.restarted(fakes[1].url)
    engine.wake()
    assert_holds(fakes, 2.0, 2)
    assert RESUME not in fakes[1].paths()
    assert {rollout.policy_version for group in draw(engine, count=2) for rollout in group} == {2}
    engine.close()


def test_servers_that_have_no_room_for_keys_and_values_are_not_in_use(
    engine: SGLangRollout, fakes: list[FakeSGLang]
) -> None:
    engine.update_weights(mini_weights(1.0), 1)
    engine.sleep()
    engine.update_weights(mini_weights(2.0), 2)
    fakes[1].refuse = {RESUME: 1}
    with pytest.raises(WeightSyncError, match=r"have version 2, and no room to answer with it.*was refused"):
        engine.wake()
    with pytest.raises(WeightSyncError, match="call update_weights first"):
        draw(engine)


@pytest.mark.parametrize("supervised", [True, False])
def test_a_lost_server_is_passed_over(supervised: bool, fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """One that is started anew as well as one that runs already, of which others are left."""
    servers = FakeSupervision(fakes) if supervised else None
    engine = attached(fakes, tmp_path, colocated=True, servers=servers)
    engine.update_weights(mini_weights(2.0), 1)
    fakes[1].die_at = RELEASE
    engine.sleep()
    assert fakes[0].released
    engine.close()


def test_servers_of_their_own_gpus_never_sleep(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    engine = attached(fakes, tmp_path)
    engine.update_weights(mini_weights(1.0), 1)
    engine.sleep()
    engine.wake()
    assert draw(engine)[0][0].policy_version == 1
    assert not any(RELEASE in fake.paths() for fake in fakes)
    engine.close()


def test_a_server_that_cannot_release_is_refused(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    fakes[1].saves_memory = False
    with pytest.raises(RolloutError, match=f"{fakes[1].url} cannot release its memory.*--enable-memory-saver"):
        attached(fakes, tmp_path, colocated=True)
