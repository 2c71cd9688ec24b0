"""Two hosts made of this one: network namespaces with names and addresses of their own, and a cable between them.

They share disk, clock and process numbers, and nothing of the network: not even loopback.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from os import kill
from typing import NamedTuple

from tests.waiting import wait_for

_NAMED = 'hostname "$0" && exec "$@"'
"""A shell's line: its first argument becomes the name of the host, the rest the process."""


_NOT_HERE = ("not permitted", "permission denied", "not supported", "unknown device type")
"""What ip says, in lower case, of a user or a kernel without namespaces or cables; all else is a fault of ours."""


class NoHostsError(Exception):
    """This machine, or this user, cannot make them; the message says what is missing."""


class CommandError(Exception):
    """A command about them failed."""


class Host(NamedTuple):
    """A network namespace, and its address on its end of the cable."""

    space: str
    address: str
    cable: str

    def command(self, words: Sequence[str]) -> list[str]:
        """``words`` as a command of this host. The process that is started becomes the command itself."""
        return ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", _NAMED, self.space, *words]

    def processes(self) -> list[int]:
        """Those that are there now."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.space).split()]

    def set_link(self, *, up: bool) -> None:
        """Plug the cable in or out. Without it nothing arrives, and nobody is told so."""
        _run("ip", "-n", self.space, "link", "set", self.cable, "up" if up else "down")

    def slow_link(self, *, delay_ms: int, loss_percent: float) -> None:
        """Have what leaves this host arrive late, or not at all. Raises NoHostsError where the kernel lacks netem."""
        words = ["delay", f"{delay_ms}ms", "loss", f"{loss_percent}%"]
        try:
            _run(
                "ip", "netns", "exec", self.space, "tc", "qdisc", "replace", "dev", self.cable, "root", "netem", *words
            )
        except CommandError as error:
            raise NoHostsError(f"links cannot be slowed down here: {error}") from error

    def end_all(self) -> None:
        """SIGKILL whatever runs here, and what it starts meanwhile, until nothing does."""

        def none_left() -> bool:
            pids = self.processes()
            for pid in pids:
                with suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            return not pids

        wait_for(none_left, poll_seconds=0.02)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The hosts, joined; whatever runs there in the end is killed. Raises NoHostsError where they cannot be made."""
    for program in ("ip", "unshare", "hostname"):
        if shutil.which(program) is None:
            raise NoHostsError(f"no `{program}` on this machine, which network namespaces are made with")
    name = secrets.token_hex(3)
    hosts = tuple(Host(f"prism-{name}-{i}", f"10.213.77.{i + 1}", f"pr{name}{i}") for i in range(2))
    try:
        _make(*hosts)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            if _exists(host):
                host.end_all()
                _run("ip", "netns", "del", host.space)


def _make(*hosts: Host) -> None:
    try:
        for words in _steps(*hosts):
            _run(*words)
    except CommandError as error:
        if any(words in str(error).lower() for words in _NOT_HERE):
            raise NoHostsError(f"{error} (it needs root)") from error
        raise


def _steps(first: Host, second: Host) -> Iterator[list[str]]:
    yield ["ip", "netns", "add", first.space]
    yield ["ip", "netns", "add", second.space]
    # Made inside a namespace, the cable goes with it.
    ends = ["name", first.cable, "type", "veth", "peer", "name", second.cable, "netns", second.space]
    yield ["ip", "-n", first.space, "link", "add", *ends]
    for space, address, cable in (first, second):
        yield ["ip", "-n", space, "addr", "add", f"{address}/24", "dev", cable]
        yield ["ip", "-n", space, "link", "set", cable, "up"]
        yield ["ip", "-n", space, "link", "set", "lo", "up"]


def _exists(host: Host) -> bool:
    return host.space in (line.split()[0] for line in _run("ip", "netns", "list").splitlines())


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout
