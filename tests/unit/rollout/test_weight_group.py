"""The group in which weights are broadcast: where it meets, and who does not come."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # offered, but not in __all__

from prism_megatron.errors import RolloutError
from prism_megatron.rollout.sglang import weight_group
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.sglang.weight_group import Parcel, WeightGroups
from prism_megatron.rollout.weight_buckets import Piece
from tests.lazy_groups import LazyGroup, Meetings
from tests.unit.rollout import fake_sglang
from tests.unit.rollout.fake_sglang import KEY, FakeSGLang
from tests.unit.rollout.weight_servers import Attach, announced, assert_holds


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


def test_workers_are_told_the_address_that_leads_to_them() -> None:
    """Claim: without a named address loopback for servers of this host, and its outer one for those reached by it."""
    outer = [
        one.address
        for of_interface in psutil.net_if_addrs().values()
        for one in of_interface
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    ]
    assert weight_group._address_towards("http://127.0.0.1:30000") == "127.0.0.1"
    if not outer:
        pytest.skip("this host has no address but loopback")
    assert weight_group._address_towards(f"http://{outer[0]}:30000") == outer[0]


def test_a_host_that_cannot_be_found_is_told() -> None:
    with pytest.raises(RolloutError, match=r"no way to http://no\.such\.host\.invalid:1 .*--rollout-master-address"):
        weight_group._address_towards("http://no.such.host.invalid:1")


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> list[LazyGroup]:
    """Makes the trainer's groups block as NCCL's; the groups that were made."""
    return _made_lazy(monkeypatch, Meetings())


def _made_lazy(monkeypatch: pytest.MonkeyPatch, meetings: Meetings) -> list[LazyGroup]:
    made: list[LazyGroup] = []
    make, receive = weight_group._make_group, fake_sglang.received

    def lazily(store: Any, name: str, size: int, **limits: timedelta) -> LazyGroup:
        made.append(LazyGroup(make(store, name, size, **limits), name, meetings))
        return made[-1]

    def receiving(group: Any, body: Mapping[str, Any]) -> dict[str, Tensor]:
        meetings.arrive(body["group_name"])
        return receive(group, dict(body))

    monkeypatch.setattr(weight_group, "_make_group", lazily)
    monkeypatch.setattr(fake_sglang, "received", receiving)
    return made


def test_weights_reach_workers_that_come_only_when_they_are_asked(
    lazy: list[LazyGroup], fakes: list[FakeSGLang], attach: Attach
) -> None:
    """Claim: with NCCL's way to make communicators a hand-over in many pieces ends, twice, on both servers."""
    engine = attach(transport="group", bucket_bytes=2**18)
    engine.update_weights(announced(1.0), 1)
    engine.update_weights(announced(2.0), 2)
    for fake in fakes:
        assert_holds(fake, 2.0, 2)
        assert fake.paths().count(fake_sglang.UPDATES[1]) > 4
    assert len(lazy) == 2


def test_the_double_blocks_whoever_broadcasts_before_asking(
    monkeypatch: pytest.MonkeyPatch, fakes: list[FakeSGLang]
) -> None:
    """Claim: it is by the order that the test above passes; the reverse never reaches the workers."""
    made = _made_lazy(monkeypatch, Meetings(seconds=0.3))
    client = ServerClient(fakes[0].url, api_key=KEY)
    WeightGroups("127.0.0.1").join(client)
    with pytest.raises(RuntimeError, match="waits for members that never come"):
        made[0].broadcast([torch.zeros(8, dtype=torch.uint8)], None)
    assert fake_sglang.UPDATES[1] not in fakes[0].paths()
    client.close()


def test_a_request_that_is_refused_ends_the_broadcast_that_waits_for_it(
    lazy: list[LazyGroup], fakes: list[FakeSGLang]
) -> None:
    """Claim: the error is the server's, at once, and the group is given up so that no thread stays in it."""
    client, groups = ServerClient(fakes[0].url, api_key=KEY), WeightGroups("127.0.0.1")
    groups.join(client)
    fakes[0].refuse = {fake_sglang.UPDATES[1]: 1}
    piece = Piece((("name", torch.ones(4)),), is_last=True)
    with pytest.raises(RolloutError, match="refused"):
        groups.send(client, Parcel(piece), {"flush_cache": True}, seconds=30.0)
    groups.leave(client)
    assert lazy[0].aborted
    client.close()
