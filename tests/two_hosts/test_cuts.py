"""The mini's alignment on two hosts: the same rows as on one, and after a cut too (``make two-hosts`` plays all cuts).

Skipped where this user may not make hosts. Blind spots: clocks, disks and kernels of their own, NCCL, and a file system
that is shared over the network that is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.two_hosts.cuts import all_cuts
from tests.two_hosts.hosts import NoHostsError, two_hosts
from tests.two_hosts.job import LAYOUTS, SMALL
from tests.two_hosts.play import WENT_ON, Stand, play_cuts, play_main, steps_for

CUTS = ("crash-policy", "stall")


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    flags = ("--steps", str(steps_for(len(CUTS))), *SMALL, *LAYOUTS["tp2"])
    try:
        with two_hosts() as hosts:
            yield Stand(hosts, tmp_path, flags, timeout_minutes=1, stall_seconds=5.0, same_rows=True)
    except NoHostsError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_ranks_on_two_hosts_are_those_on_one_and_survive_what_befalls_them(stand: Stand) -> None:
    """Claim: rows and weights are those of the same ranks on one host, to the bit. A host whose processes are killed is
    named by the other one within the stated time, the same line on both goes on; a link that comes back before the
    timeout costs its time and nothing else; rows and weights are the same still."""
    assert play_main(stand).problems == []
    cuts = [all_cuts()[name] for name in CUTS]
    told = list(play_cuts(stand, cuts, stand.job("two-hosts")))
    print(*told, sep="\n")
    assert [problem for one in told for problem in one.problems] == []
    assert [one.name for one in told] == [*CUTS, "end"] and told[1].line == WENT_ON
