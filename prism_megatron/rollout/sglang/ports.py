"""Ports for servers."""

from __future__ import annotations

import secrets
import socket

from prism_megatron.errors import RolloutError

_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


def free_port(host: str) -> int:
    """A free port from below those that the kernel hands out itself (32768 and up, unless it is told otherwise).

    A server binds its port only after a minute of loading; one of the kernel's would often be gone by then. Raises
    RolloutError where none is free.
    """
    for _ in range(_NUM_PORTS):
        port = _FIRST_PORT + secrets.randbelow(_NUM_PORTS)
        if why_not_free(host, port) is None:
            return port
    raise RolloutError(
        f"no port of {host} from {_FIRST_PORT} to {_FIRST_PORT + _NUM_PORTS - 1} is free for a server "
        f"({why_not_free(host, _FIRST_PORT)})"
    )


def why_not_free(host: str, port: int) -> str | None:
    """None, or why a server cannot listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do it: a connection of before that is not quite over takes no port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None
