"""The group in which weights are broadcast: where it meets, and who does not come."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # offered, but not in __all__

from prism_megatron.errors import RolloutError
from prism_megatron.rollout.sglang import weight_group
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.sglang.weight_group import WeightGroups
from tests.unit.rollout.fake_sglang import KEY, FakeSGLang


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
