"""Naming the rank that is gone (blind spot: other hosts, of which only the silence is known)."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from prism_megatron.run import peers
from prism_megatron.run.peers import Peer, Peers

HERE = os.getpid()


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_ranks_that_ended_are_named_and_the_first_that_is_left_speaks() -> None:
    gone = ended_pid()
    own = Peers([Peer(0, "a", gone), Peer(1, "a", HERE), Peer(2, "a", gone), Peer(3, "b", gone)], "a")
    assert [peer.rank for peer in own.gone()] == [0, 2]
    assert own.describe_loss() == "ranks 0, 2 on a ended without a word"
    assert own.speaker() == 1
    assert Peers([Peer(0, "a", HERE), Peer(1, "a", gone)], "a").describe_loss() == "rank 1 on a ended without a word"


def test_a_process_that_nobody_has_waited_for_yet_is_gone_too() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read() == b""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Peer(0, "a", process.pid).is_gone
    process.wait()


def test_a_process_whose_connections_close_before_it_ends_is_waited_for() -> None:
    """As the kernel does with one that is killed: its peers read the end of a connection while it is still there."""
    code = "import os, sys; os.close(1); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None and process.stdout.read() == b""
    own = Peers([Peer(0, "a", HERE), Peer(1, "a", process.pid)], "a")
    assert own.gone() == own.wait_for_gone(seconds=0.0) == []
    with ThreadPoolExecutor(1) as others:
        waiting = others.submit(own.wait_for_gone, seconds=60.0)
        process.stdin.close()
        assert [peer.rank for peer in waiting.result()] == [1]
    process.wait()


def test_where_all_are_there_the_others_are_named() -> None:
    here = [Peer(0, "a", HERE)]
    assert Peers([*here, Peer(1, "c", 1), Peer(2, "b", 1)], "a").describe_loss() == (
        "all ranks on a are there, those of b, c no longer answer"
    )
    assert Peers(here, "a").gone() == []


def test_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "all_gather_objects", lambda own: [own, Peer(1, "b", 5)])
    met = Peers.meet(0)
    assert met.peers[0] == Peer(0, met.host, HERE) and met.peers[1].host == "b"
