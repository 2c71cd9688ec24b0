"""Which hosts a run spans, which of them this rank is on, and by which address the others reach it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from prism_megatron.errors import ConfigError
from prism_megatron.rollout.sglang.arguments import HOST

_ANY_PORT = 9  # nothing is sent there: the kernel is only asked for the way


@dataclass(frozen=True)
class Host:
    """A rank's host among those of its run; torchrun numbers ranks host by host."""

    number: int
    count: int
    """hosts of the run"""
    num_ranks: int
    """of each host"""
    leads: bool
    """whether this rank is the first of the host, which starts and supervises its servers"""

    @classmethod
    def of(cls, rank: int, world_size: int, environment: Mapping[str, str] = os.environ) -> Host:
        """By LOCAL_WORLD_SIZE, without which all ranks are on one host.

        Raises ConfigError where hosts have unequally many ranks.
        """
        here = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        if world_size % here:
            raise ConfigError(
                f"servers are started on hosts with equally many ranks, and {here} of {world_size} are on this one; "
                "use the same --nproc-per-node on all, or start servers yourself and name them with --rollout-urls"
            )
        return cls(number=rank // here, count=world_size // here, num_ranks=here, leads=rank % here == 0)


def address_of(host: Host, interface: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Where servers of this host listen: loopback where they are this run's only host, else where others reach it.

    That is the address of ``interface``, or of the one that leads to the first rank. Raises ConfigError where there is
    none.
    """
    if host.count == 1:
        return HOST
    if interface is not None:
        return _address_on(interface)
    master = environment.get("MASTER_ADDR")
    if master is None:
        raise ConfigError("MASTER_ADDR is not set, which leads to the other hosts; name --rollout-interface")
    try:
        family, _, _, _, place = socket.getaddrinfo(master, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"no way leads from this host to the first rank at {master} ({error}); name --rollout-interface"
        ) from error
    if address.startswith("127.") or address == "::1":
        raise ConfigError(
            f"the first rank is reached at {master}, by {address} of this host, which no other host can reach; name "
            "--rollout-interface"
        )
    return address


def _address_on(interface: str) -> str:
    found = psutil.net_if_addrs()
    if interface not in found:
        raise ConfigError(f"--rollout-interface {interface} is no interface of this host; it has {', '.join(found)}")
    addresses = [entry.address for entry in found[interface] if entry.family in (socket.AF_INET, socket.AF_INET6)]
    usable = [address for address in addresses if not address.startswith("fe80:")]  # needs a scope to be reached
    if not usable:
        raise ConfigError(f"--rollout-interface {interface} has no address on this host; give it one, or name another")
    return usable[0]
