"""Ranks of one host hear each other's last words; those who have ended hear nothing, and nobody waits."""

from __future__ import annotations

import socket
from contextlib import closing

from prism_megatron.run.ending.last_word import LastWord


def test_a_word_is_heard_after_whoever_said_it_has_gone() -> None:
    with closing(LastWord()) as listener:
        assert listener.heard() is None
        with closing(LastWord()) as speaker:
            speaker.tell([listener.address], 3, "those of b no longer answer")
        assert listener.heard() == (3, "those of b no longer answer")
        assert listener.heard() is None


def test_one_that_has_ended_is_passed_over() -> None:
    gone = LastWord()
    address = gone.address
    gone.close()
    with closing(LastWord()) as speaker, closing(LastWord()) as listener:
        speaker.tell([address, listener.address], 0, "x")
        assert listener.heard() == (0, "x")


def test_a_long_word_is_cut_and_not_lost() -> None:
    """Claim: what was cut is still read, whatever characters it is made of."""
    with closing(LastWord()) as speaker, closing(LastWord()) as listener:
        speaker.tell([listener.address], 0, "ä" * 10_000)
        heard = listener.heard()
        assert heard is not None and set(heard[1]) == {"ä"}


def test_what_no_rank_has_said_is_not_heard() -> None:
    """Claim: any process of the host may write there, and breaks nothing."""
    with closing(LastWord()) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        for word in (b"\xff", b"[1]", b"7", b'[null, "x"]'):
            stranger.sendto(word, listener.address.encode("ascii"))
            assert listener.heard() is None, word
