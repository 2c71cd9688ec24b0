"""Which host a rank is on, by the variables that torchrun sets, and by which address others reach it."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from prism_megatron.errors import ConfigError
from prism_megatron.sampling.hosts import Host, address_of

ONE = Host(number=0, count=1, num_ranks=4, leads=True)
TWO = Host(number=1, count=2, num_ranks=4, leads=True)


def entry(family: socket.AddressFamily, address: str) -> Any:
    return SimpleNamespace(family=family, address=address)


def test_ranks_are_counted_host_by_host() -> None:
    found = [Host.of(rank, 6, {"LOCAL_WORLD_SIZE": "2"}) for rank in range(6)]
    assert [host.number for host in found] == [0, 0, 1, 1, 2, 2]
    assert [host.leads for host in found] == [True, False] * 3
    assert {(host.count, host.num_ranks) for host in found} == {(3, 2)}


def test_without_a_launcher_of_several_all_ranks_are_on_one() -> None:
    assert Host.of(3, 4, {}) == Host(number=0, count=1, num_ranks=4, leads=False)


def test_hosts_of_unequally_many_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 of 5 are on this one; use the same --nproc-per-node"):
        Host.of(0, 5, {"LOCAL_WORLD_SIZE": "2"})


def test_servers_of_a_lone_host_listen_where_no_other_reaches_them() -> None:
    """Whatever interface is named: nobody of another host has to ask them."""
    assert address_of(ONE, None, {"MASTER_ADDR": "10.0.0.1"}) == "127.0.0.1"
    assert address_of(ONE, "eth0", {}) == "127.0.0.1"


def test_an_address_of_the_named_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that others can use: a link-local one needs a scope, and one of the link itself is none."""
    interfaces = {
        "eth0": [
            entry(socket.AF_PACKET, "aa:bb:cc:dd:ee:ff"),
            entry(socket.AF_INET6, "fe80::1%eth0"),
            entry(socket.AF_INET, "10.1.2.3"),
        ],
        "ib0": [entry(socket.AF_INET6, "fe80::2%ib0")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    assert address_of(TWO, "eth0", {}) == "10.1.2.3"
    with pytest.raises(ConfigError, match="--rollout-interface ib0 has no address"):
        address_of(TWO, "ib0", {})
    with pytest.raises(ConfigError, match="--rollout-interface eth1 is no interface of this host; it has eth0, ib0"):
        address_of(TWO, "eth1", {})


def test_the_way_to_the_first_rank_must_lead_out_of_the_host() -> None:
    with pytest.raises(ConfigError, match=r"by 127\.0\.0\.1 of this host, which no other host can reach"):
        address_of(TWO, None, {"MASTER_ADDR": "127.0.0.1"})
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set"):
        address_of(TWO, None, {})
    with pytest.raises(ConfigError, match=r"no way leads from this host to the first rank at nowhere\.invalid"):
        address_of(TWO, None, {"MASTER_ADDR": "nowhere.invalid"})
