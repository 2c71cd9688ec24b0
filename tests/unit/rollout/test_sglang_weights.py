"""Weight updates over two servers: exact, checked beforehand, and on all of them or none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # offered, but not in __all__

from prism_megatron.conversion.announced_weights import AnnouncedWeights
from prism_megatron.errors import RolloutError, WeightSyncError
from prism_megatron.rollout.sglang import weight_group
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.sglang.weight_group import WeightGroups
from prism_megatron.rollout.sglang.weights import Transport
from tests.unit.rollout.attached import IMPATIENT, FakeSupervision
from tests.unit.rollout.fake_sglang import FOLDER, KEY, UPDATES, FakeSGLang, running, unpack
from tests.unit.rollout.tiny_qwen import NoSegments
from tests.unit.rollout.weights import mini_weights

BY_TENSOR, BY_GROUP, _ = UPDATES
PATH_OF: dict[Transport, str] = {"tensor": BY_TENSOR, "group": BY_GROUP}


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(image_token_id=498)) for _ in range(2)]


Attach = Callable[..., SGLangRollout]


@pytest.fixture
def attach(fakes: list[FakeSGLang], tmp_path: Path) -> Iterator[Attach]:
    engines: list[SGLangRollout] = []

    def build(servers: Any = None, **options: Any) -> SGLangRollout:
        settings: dict[str, Any] = {"patience": IMPATIENT} | options
        engines.append(
            SGLangRollout(
                FOLDER,
                NoSegments(),
                urls=[fake.url for fake in fakes],
                api_key=KEY,
                end_token_ids=[488],
                spool=tmp_path,
                servers=servers,
                options=SGLangOptions(**settings),
            )
        )
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()
        engine.close()  # as the queue of a run that ends early does, and then the run
    assert not list(tmp_path.iterdir()), "spooled weights were left behind"


def assert_holds(fake: FakeSGLang, factor: float, version: int) -> None:
    expected = dict(mini_weights(factor))
    assert fake.version == str(version) and not fake.session_open and not fake.paused
    assert fake.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(fake.weights[name], tensor), name


def announced(factor: float, *, left_out: AbstractSet[str] = frozenset()) -> AnnouncedWeights:
    """As an engine exports them: names and shapes first."""
    weights = {name: tensor for name, tensor in mini_weights(factor) if name not in left_out}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return AnnouncedWeights(shapes, iter(weights.items()), left_out=left_out)


VISION = frozenset(name for name, _ in mini_weights() if ".visual." in name)


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


def test_workers_that_do_not_come_are_named_with_the_address_they_were_given(
    fakes: list[FakeSGLang],
) -> None:
    """A firewall's silence: the server takes the call and its workers never reach the trainer."""
    groups = WeightGroups("127.0.0.1", join_seconds=0.6)
    fakes[0].cut_off, fakes[0].tp_size = threading.Event(), 3
    client = ServerClient(fakes[0].url, api_key=KEY)
    with pytest.raises(RolloutError, match=r"trainer at 127.0.0.1:\d+ in 1 s.*rollout-master-address"):
        groups.join(client)
    request = dict(fakes[0].calls)["/init_weights_update_group"]
    assert (request["world_size"], request["rank_offset"]) == (4, 1), "the trainer and the server's three workers"
    fakes[0].cut_off.set()
    with pytest.raises(RolloutError, match=r"--rollout-master-address 192.0.2.1 is not an address of this host"):
        WeightGroups("192.0.2.1").join(client)
    client.close()


@pytest.mark.parametrize("address", ["::1", "0:0:0:0:0:0:0:1"])
def test_the_store_of_a_group_may_have_an_address_of_ipv6(address: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    store, port = weight_group._store(address, timedelta(seconds=5))
    other = TCPStore("::1", port, is_master=False, timeout=timedelta(seconds=5))
    other.set("key", "value")
    assert store.get("key") == b"value"


def test_a_name_that_is_no_address_is_refused() -> None:
    with pytest.raises(RolloutError, match=r"--rollout-master-address no\.such\.host\.invalid is no address"):
        weight_group._store("no.such.host.invalid", timedelta(seconds=5))


def test_the_store_of_a_group_listens_on_the_address_that_it_was_given() -> None:
    """And on no other: 127.0.0.2 is this host too, and whoever reaches the store can join the group."""
    store, port = weight_group._store("127.0.0.1", timedelta(seconds=5))
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    del store


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


def test_a_server_of_nobodys_that_dies_in_an_update_is_a_failure(attach: Attach, fakes: list[FakeSGLang]) -> None:
    """The other goes back; as the dead one cannot, nothing is generated until both take an update."""
    engine = attach()
    engine.update_weights(mini_weights(2.0), 1)
    fakes[1].die_at = "/update_weights_from_tensor"
    with pytest.raises(WeightSyncError, match=f"{fakes[1].url} cannot be reached"):
        engine.update_weights(mini_weights(3.0), 2)
    assert engine.policy_version is None
    fakes[1].restart()
    engine.update_weights(mini_weights(3.0), 3)
    for fake in fakes:
        assert_holds(fake, 3.0, 3)


@pytest.mark.parametrize(("path", "version"), [("/pause_generation", 1), (BY_TENSOR, None)])
def test_a_server_that_is_restarted_no_more_is_a_failure_like_any_other(
    path: str, version: int | None, attach: Attach, fakes: list[FakeSGLang], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: what its supervisor says is told, and the other server is neither left paused nor used half updated."""
    supervision = FakeSupervision(fakes)

    def unwatched(url: str) -> bool:
        raise RolloutError(f"{url} died once more than it is restarted")

    monkeypatch.setattr(supervision, "replace", unwatched)
    engine = attach(servers=supervision)
    engine.update_weights(announced(2.0), 1)
    fakes[1].die_at = path
    with pytest.raises(WeightSyncError, match="died once more"):
        engine.update_weights(announced(3.0), 2)
    assert engine.policy_version == version
    assert fakes[0].paths()[-1] == "/continue_generation"


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
