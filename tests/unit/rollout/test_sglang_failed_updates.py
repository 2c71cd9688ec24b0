"""A server that fails, dies or lies in a weight update: all have the new weights, or all the last good ones."""

from __future__ import annotations

import pytest
from torch import Tensor

from prism_megatron.errors import RolloutError, WeightSyncError
from prism_megatron.rollout.sglang.weights import Transport
from tests.unit.rollout.attached import FakeSupervision
from tests.unit.rollout.fake_sglang import FakeSGLang
from tests.unit.rollout.weight_servers import BY_GROUP, BY_TENSOR, Attach, announced, assert_holds
from tests.unit.rollout.weights import mini_weights


@pytest.mark.parametrize(
    ("transport", "path"),
    [
        ("tensor", "/pause_generation"),
        ("tensor", BY_TENSOR),
        ("tensor", "/end_weight_update"),
        ("group", "/init_weights_update_group"),
        ("group", BY_GROUP),
    ],
)
def test_a_server_that_dies_in_an_update_gets_the_new_weights_when_it_is_back(
    transport: Transport, path: str, attach: Attach, fakes: list[FakeSGLang]
) -> None:
    """The update goes on without it: it is no failure, for its successor asks for the weights."""
    supervision = FakeSupervision(fakes)
    engine = attach(servers=supervision, transport=transport)
    if path != "/init_weights_update_group":
        engine.update_weights(announced(2.0), 1)
    fakes[1].die_at = path
    engine.update_weights(announced(3.0), 2)
    assert set(supervision.replaced) == {fakes[1].url} and engine.policy_version == 2
    assert_holds(fakes[0], 3.0, 2)
    fakes[1].restart()
    fakes[1].die_at = path
    with pytest.raises(WeightSyncError, match="lost again"):
        supervision.restarted(fakes[1].url)
    fakes[1].restart()
    calls_to_the_other = len(fakes[0].calls)
    supervision.restarted(fakes[1].url)
    assert_holds(fakes[1], 3.0, 2)
    assert len(fakes[0].calls) == calls_to_the_other, "a restored server is nobody else's business"


@pytest.mark.parametrize(("path", "version"), [("/pause_generation", 1), (BY_TENSOR, None)])
def test_a_server_that_is_restarted_no_more_is_a_failure_like_any_other(
    path: str, version: int | None, attach: Attach, fakes: list[FakeSGLang], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: what its supervisor says is told, and the other server is neither left paused nor used half updated."""
    supervision = FakeSupervision(fakes)

    def unwatched(url: str) -> bool:
        raise RolloutError(f"{url} died, and servers were restarted 12 times")

    monkeypatch.setattr(supervision, "replace", unwatched)
    engine = attach(servers=supervision)
    engine.update_weights(announced(2.0), 1)
    fakes[1].die_at = path
    with pytest.raises(WeightSyncError, match="restarted 12 times"):
        engine.update_weights(announced(3.0), 2)
    assert engine.policy_version == version
    assert fakes[0].paths()[-1] == "/continue_generation"


@pytest.mark.parametrize(
    ("transport", "path"),
    [
        ("tensor", "/begin_weight_update"),  # phase one
        ("tensor", "/update_weights_from_tensor"),
        ("tensor", "/end_weight_update"),
        ("disk", "/update_weights_from_disk"),
        ("group", "/begin_weight_update"),
        ("group", BY_GROUP),
    ],
)
def test_when_one_server_fails_all_keep_the_last_good_version(
    transport: Transport, path: str, attach: Attach, fakes: list[FakeSGLang]
) -> None:
    engine = attach(transport=transport)
    engine.update_weights(mini_weights(2.0), 1)
    fakes[1].refuse[path] = 1
    with pytest.raises(WeightSyncError, match=f"{path} was refused"):
        engine.update_weights(announced(3.0), 2)
    for fake in fakes:
        assert_holds(fake, 2.0, 1)
    assert engine.policy_version == 1
    engine.update_weights(announced(3.0), 2)
    for fake in fakes:
        assert_holds(fake, 3.0, 2)


def test_a_server_that_failed_gets_a_new_group_and_no_other_does(attach: Attach, fakes: list[FakeSGLang]) -> None:
    """Of a group in which something went wrong nothing is known."""
    engine = attach(transport="group")
    fakes[1].refuse["/begin_weight_update"] = 1
    with pytest.raises(WeightSyncError, match="was refused"):
        engine.update_weights(announced(2.0), 1)
    engine.update_weights(announced(2.0), 1)
    assert [fake.paths().count("/init_weights_update_group") for fake in fakes] == [1, 2]
    assert [fake.paths().count("/destroy_weights_update_group") for fake in fakes] == [0, 1]


def test_a_server_that_fails_in_the_middle_ends_the_update(attach: Attach, fakes: list[FakeSGLang]) -> None:
    """Of many pieces one server refuses the first: the other is not sent them all, and both go back."""
    engine = attach(bucket_bytes=300_000)
    engine.update_weights(announced(2.0), 1)
    pieces = fakes[0].paths().count(BY_TENSOR)
    fakes[0].calls.clear()
    fakes[1].refuse[BY_TENSOR] = 1
    with pytest.raises(WeightSyncError, match=f"{BY_TENSOR} was refused"):
        engine.update_weights(announced(3.0), 2)
    assert fakes[0].paths().count(BY_TENSOR) <= pieces + 2
    for fake in fakes:
        assert_holds(fake, 2.0, 1)
    assert engine.policy_version == 1


def test_a_server_that_reports_another_version_after_an_update_is_found(
    attach: Attach, fakes: list[FakeSGLang]
) -> None:
    engine = attach()
    load = fakes[1].load

    def of_another_trainer(tensors: dict[str, Tensor]) -> None:
        load(tensors)
        fakes[1].calls[-1][1]["weight_version"] = "7"

    fakes[1].load = of_another_trainer  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="reports version '7' after taking 1"):
        engine.update_weights(announced(2.0), 1)
    assert engine.policy_version is None


def test_servers_that_cannot_go_back_are_not_used(attach: Attach, fakes: list[FakeSGLang]) -> None:
    engine = attach()
    engine.update_weights(mini_weights(2.0), 1)
    fakes[1].refuse["/update_weights_from_tensor"] = 2
    with pytest.raises(WeightSyncError, match="could not go back to version 1"):
        engine.update_weights(mini_weights(3.0), 2)
    assert engine.policy_version is None
    engine.update_weights(mini_weights(3.0), 2)
    assert engine.policy_version == 2


def test_a_server_that_holds_other_weights_after_an_update_is_found(attach: Attach, fakes: list[FakeSGLang]) -> None:
    """The checksum's claim: an update that a server passes over in silence does not go unseen."""
    engine = attach()
    engine.update_weights(mini_weights(2.0), 1)
    del fakes[1].weights["model.visual.merger.norm.weight"]
    with pytest.raises(WeightSyncError, match="hold different weights"):
        engine.update_weights(mini_weights(3.0), 2)
