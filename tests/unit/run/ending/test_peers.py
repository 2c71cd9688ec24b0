"""Naming the rank that is gone (blind spot: other hosts, of which only the silence is known)."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from prism_megatron.run.ending import peers as module
from prism_megatron.run.ending.last_word import LastWord
from prism_megatron.run.ending.peers import Loss, Peer, Peers

HERE = os.getpid()
CLOSED = RuntimeError("[/gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:7. This is typically caused by a crash")


@pytest.fixture(autouse=True)
def _nobody_dies_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that have not ended are not waited for, where a test does not ask for it."""
    wait = Peers.wait_for_gone
    monkeypatch.setattr(Peers, "wait_for_gone", lambda self, seconds=0.0: wait(self, seconds=seconds))
    monkeypatch.setattr(module, "_FIRST_SPEAKS_SECONDS", 0.0)


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_ranks_that_ended_are_named_and_the_first_that_is_left_speaks() -> None:
    gone = ended_pid()
    own = Peers([Peer(0, "a", gone), Peer(1, "a", HERE), Peer(2, "a", gone), Peer(3, "b", gone)], "a")
    assert [peer.rank for peer in own.gone()] == [0, 2]
    assert own.loss(KeyError("whatever")) == Loss("ranks 0, 2 on a ended without a word", speaker=1)
    one = Peers([Peer(0, "a", HERE), Peer(1, "a", gone)], "a")
    assert one.loss(CLOSED) == Loss("rank 1 on a ended without a word", speaker=0)


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


@pytest.mark.parametrize(("hosts", "words"), [(("b", "b"), "b"), (("c", "b"), "b or c")])
def test_where_all_are_there_the_other_hosts_are_named(hosts: tuple[str, str], words: str) -> None:
    peers = Peers([Peer(0, "a", HERE), *(Peer(1 + i, host, 1) for i, host in enumerate(hosts))], "a")
    with closing(peers):
        said = f"all ranks on a are there, those of {words} no longer answer (Connection closed by peer [10.0.0.2]:7)"
        assert peers.loss(CLOSED) == Loss(said, speaker=0)


def test_a_bug_is_no_loss_and_one_host_blames_no_other() -> None:
    """Claim: an error of another kind keeps its traceback, and so does one of a connection between ranks that are all
    there, on this host."""
    with closing(Peers([Peer(0, "a", HERE), Peer(1, "b", 1)], "a")) as peers:
        assert peers.loss(KeyError("bug")) is None
    with closing(Peers([Peer(0, "a", HERE), Peer(1, "a", HERE)], "a")) as peers:
        assert peers.loss(CLOSED) is None


def test_one_rank_of_a_host_speaks_and_the_others_know_why_it_went() -> None:
    """Claim: whoever finds another host silent tells its neighbours, which then name that host and not the neighbour
    whose end broke their own connections; whichever of them comes first, one speaks."""
    words = [LastWord(), LastWord()]
    for first, second in ((0, 1), (1, 0)):
        known = [Peer(rank, "a", HERE, words[rank].address) for rank in range(2)] + [Peer(2, "b", 1)]
        found = Peers(known, "a", first, words[first]).loss(CLOSED)
        assert found is not None and found.speaker == first
        known[first] = replace(known[first], pid=ended_pid())
        assert Peers(known, "a", second, words[second]).loss(CLOSED) == found
    for word in words:
        word.close()
