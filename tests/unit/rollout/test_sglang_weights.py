"""Weight updates over two servers: exact, and checked before anything is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prism_megatron.conversion.announced_weights import AnnouncedWeights
from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.sglang.weights import Transport
from tests.unit.rollout.attached import FakeSupervision
from tests.unit.rollout.fake_sglang import UPDATES, FakeSGLang, unpack
from tests.unit.rollout.weight_servers import BY_GROUP, BY_TENSOR, VISION, Attach, announced, assert_holds
from tests.unit.rollout.weights import mini_weights


@pytest.mark.parametrize("transport", ["tensor", "disk", "group"])
def test_both_servers_hold_exactly_what_was_handed_over(
    transport: Transport, attach: Attach, fakes: list[FakeSGLang]
) -> None:
    engine = attach(transport=transport)
    for version, factor in ((1, 1.5), (2, 0.5)):
        engine.update_weights(mini_weights(factor) if version == 1 else announced(factor), version)
        assert engine.policy_version == version
        for fake in fakes:
            assert_holds(fake, factor, version)
    for fake in fakes:
        last = [body for path, body in fake.calls if path in UPDATES][-1]
        assert last["flush_cache"] is True, "keys and values of the old weights would be used again"
        pauses = [body["mode"] for path, body in fake.calls if path == "/pause_generation"]
        assert pauses == ["retract"] * 2, "unfinished answers would go on from keys and values of the old weights"


def test_calls_carry_half_a_bucket_at_most(attach: Attach, fakes: list[FakeSGLang]) -> None:
    limit = 150_000
    attach(bucket_bytes=2 * limit).update_weights(announced(2.0), 0)
    bodies = [body for path, body in fakes[0].calls if path == BY_TENSOR]
    sizes = [[t.nbytes for t in unpack(body["serialized_named_tensors"][0]).values()] for body in bodies]
    assert len(sizes) > 5 and all(sum(bucket) <= limit or len(bucket) == 1 for bucket in sizes)
    assert any(sum(bucket) > limit for bucket in sizes), "blind: no tensor is larger than the limit"
    assert [body["flush_cache"] for body in bodies] == [False] * (len(bodies) - 1) + [True]
    assert [body.get("weight_version") for body in bodies] == [None] * (len(bodies) - 1) + ["0"]
    assert_holds(fakes[1], 2.0, 0)


@pytest.mark.parametrize("transport", ["tensor", "group"])
def test_pieces_are_sent_while_the_next_are_gathered(
    transport: Transport, attach: Attach, fakes: list[FakeSGLang]
) -> None:
    """A server does not get through the first piece before the second is being gathered. Blind to the time it saves."""
    engine = attach(transport=transport, bucket_bytes=300_000)
    gathering_second = threading.Event()
    overlapped: list[bool] = []
    load = fakes[0].load

    def slow_load(tensors: dict[str, Tensor]) -> None:
        if not overlapped:
            overlapped.append(gathering_second.wait(20.0))
        load(tensors)

    fakes[0].load = slow_load  # type: ignore[method-assign]

    def gathered() -> Iterator[tuple[str, Tensor]]:
        size = 0
        for name, tensor in mini_weights(2.0):
            if size > 150_000:  # the first piece is full, and under way
                gathering_second.set()
            size += tensor.nbytes
            yield name, tensor

    shapes = {name: tuple(tensor.shape) for name, tensor in mini_weights()}
    engine.update_weights(AnnouncedWeights(shapes, gathered()), 1)
    assert overlapped == [True]
    assert_holds(fakes[0], 2.0, 1)


def test_weights_are_refused_by_their_names_before_one_is_gathered(attach: Attach, fakes: list[FakeSGLang]) -> None:
    engine = attach(transport="group")
    for fake in fakes:
        fake.calls.clear()

    def nothing() -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("a tensor was gathered")
        yield

    shapes = {name: tuple(tensor.shape) for name, tensor in mini_weights()}
    for change, message in (({"model.strange": (3,)}, "no weight 'model.strange'"), ({}, "were not sent")):
        wrong = shapes | change
        if not change:
            del wrong["model.visual.patch_embed.proj.weight"]
        with pytest.raises(WeightSyncError, match=message):
            engine.update_weights(AnnouncedWeights(wrong, nothing()), 1)
    assert not any(fake.calls for fake in fakes)


def test_weights_that_go_wrong_on_their_way_bring_all_servers_back(attach: Attach, fakes: list[FakeSGLang]) -> None:
    """A tensor of another shape than was announced, after others have been sent."""
    engine = attach(transport="group", bucket_bytes=300_000)
    engine.update_weights(announced(2.0), 1)
    broken = list(mini_weights(3.0))
    shapes = {name: tuple(tensor.shape) for name, tensor in broken}
    name, tensor = broken[-1]
    broken[-1] = (name, tensor[: len(tensor) // 2])
    sent = fakes[0].paths().count(BY_GROUP)
    with pytest.raises(WeightSyncError, match="gathered"):
        engine.update_weights(AnnouncedWeights(shapes, iter(broken)), 2)
    assert fakes[0].paths().count(BY_GROUP) > sent, "blind: nothing had been sent"
    for fake in fakes:
        assert_holds(fake, 2.0, 1)
    assert engine.policy_version == 1


@pytest.mark.parametrize("transport", ["tensor", "disk", "group"])
def test_what_does_not_change_is_sent_once(transport: Transport, attach: Attach, fakes: list[FakeSGLang]) -> None:
    """And a server that was restarted since gets it all the same: the vision tower of its own folder is another one."""
    supervision = FakeSupervision(fakes)
    engine = attach(servers=supervision, transport=transport, bucket_bytes=1_000_000)
    with pytest.raises(WeightSyncError, match="send all first"):
        engine.update_weights(announced(2.0, left_out=VISION), 1)
    engine.update_weights(announced(2.0), 1)
    for version, factor in ((2, 3.0), (3, 4.0)):
        for fake in fakes:
            fake.calls.clear()
            fake.loaded.clear()
        engine.update_weights(announced(factor, left_out=VISION), version)
        for fake in fakes:
            assert transport == "disk" or not fake.loaded & VISION
            assert_mixed(fake, factor, version)
        fakes[1].restart()
        supervision.restarted(fakes[1].url)
        assert_mixed(fakes[1], factor, version)
    fakes[1].refuse["/end_weight_update" if transport != "disk" else UPDATES[-1]] = 1
    with pytest.raises(WeightSyncError, match="was refused"):
        engine.update_weights(announced(5.0, left_out=VISION), 4)
    for fake in fakes:
        assert_mixed(fake, 4.0, 3)


@pytest.mark.parametrize("restarted", [(0, 1), (0,), (1,)], ids=str)
def test_a_server_that_was_started_again_unnoticed_gets_what_does_not_change_too(
    restarted: tuple[int, ...], attach: Attach, fakes: list[FakeSGLang]
) -> None:
    """One that somebody else runs, or our own before its weights are back. Its folder's vision tower is another one."""
    engine = attach()
    engine.update_weights(announced(2.0), 1)
    for number in restarted:
        fakes[number].restart()
    engine.update_weights(announced(3.0, left_out=VISION), 2)
    expected = dict(mini_weights(2.0)) | {n: t for n, t in mini_weights(3.0) if n not in VISION}
    for fake in fakes:
        assert fake.version == "2" and all(torch.equal(fake.weights[n], t) for n, t in expected.items())


def test_weights_are_left_out_only_of_what_has_been_taken(attach: Attach, fakes: list[FakeSGLang]) -> None:
    """A first update that failed has given the servers nothing to keep."""
    engine = attach()
    fakes[1].refuse["/begin_weight_update"] = 1
    with pytest.raises(WeightSyncError, match="was refused"):
        engine.update_weights(announced(2.0), 1)
    engine.expect(2)
    with pytest.raises(WeightSyncError, match="send all first"):
        engine.update_weights(announced(2.0, left_out=VISION), 2)


def test_one_version_is_on_disk_between_updates(attach: Attach, tmp_path: Path) -> None:
    engine = attach()
    for version in range(4):
        engine.update_weights(announced(1.0 + version), version)
        assert len(list(tmp_path.iterdir())) == 1


def assert_mixed(fake: FakeSGLang, factor: float, version: int) -> None:
    """The vision tower times 2, all else times ``factor``."""
    assert fake.version == str(version)
    for (name, first), (_, changed) in zip(mini_weights(2.0), mini_weights(factor), strict=True):
        assert torch.equal(fake.weights[name], first if name in VISION else changed), name


def renamed(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name.replace("visual.blocks.1.mlp", "visual.block.1.mlp"), tensor


def sharded(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, tensor[: len(tensor) // 2] if name.endswith("layers.2.mlp.down_proj.weight") else tensor


def without_vision(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in weights if "visual" not in name)


def twice(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, tensor
        yield name, tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "no weight 'model.visual.block.1.mlp"),
        (sharded, r"layers.2.mlp.down_proj.weight' has shape .* gathered"),
        (without_vision, "weights of the rollout model were not sent: model.visual"),
        (twice, "sent twice"),
    ],
)
def test_wrong_weights_are_refused_before_anything_is_sent(
    change: Callable[[Iterator[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]],
    message: str,
    attach: Attach,
    fakes: list[FakeSGLang],
) -> None:
    engine = attach()
    engine.update_weights(mini_weights(2.0), 1)
    for fake in fakes:
        fake.calls.clear()
    with pytest.raises(WeightSyncError, match=message):
        engine.update_weights(change(mini_weights()), 2)
    for fake in fakes:
        assert not fake.calls
        assert_holds(fake, 2.0, 1)
    assert engine.policy_version == 1


def test_a_tied_head_may_be_handed_over_too(attach: Attach) -> None:
    """An export that lists it is accepted; servers copy the embedding anyway."""
    weights = dict(mini_weights())
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    engine = attach()
    engine.update_weights(iter(weights.items()), 4)
    assert engine.policy_version == 4
