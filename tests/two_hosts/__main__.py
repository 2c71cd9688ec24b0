"""``make two-hosts``: the mini's alignment on two hosts, and what befalls them.

    python -m tests.two_hosts                          the main job, then every cut (about an hour on two cores)
    python -m tests.two_hosts --cuts crash-policy full
    python -m tests.two_hosts --cuts none --layout pp2
    python -m tests.two_hosts --cuts none --rollout sglang

Exits with 1 where anything is not as docs/running.md says, with 2 where hosts cannot be made.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.two_hosts.cuts import all_cuts
from tests.two_hosts.hosts import NoHostsError, two_hosts
from tests.two_hosts.job import LAYOUTS, SMALL
from tests.two_hosts.play import Stand, Told, play_cuts, play_full, play_main, steps_for

FULL = "full"
SGLANG = ("--rollout", "sglang")
TIMEOUT_MINUTES = {"embedded": 2, "sglang": 15}
"""Servers take minutes to start on a CPU, and ranks wait for them."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags. Ends the process for unknown ones."""
    known = [*all_cuts(), FULL]
    parser = argparse.ArgumentParser(prog="make two-hosts", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2", help="how the two ranks of a host share the models")
    parser.add_argument("--cuts", nargs="+", choices=[*known, "all", "none"], default=["all"], metavar="CUT",
                        help=f"all, none, or some of: {', '.join(known)}")  # fmt: skip
    parser.add_argument(
        "--rollout", choices=["embedded", "sglang"], default="embedded", help="sglang: one server a host"
    )
    parser.add_argument(
        "--timeout-minutes", type=int, help="--distributed-timeout-minutes of the runs: 2, or 15 with servers"
    )
    parser.add_argument("--stall-seconds", type=float, default=60.0, help="how long the link is gone in `stall`")
    parser.add_argument("--delay-ms", type=int, default=0, help="of every packet, where the kernel has netem")
    parser.add_argument("--loss-percent", type=float, default=0.0, help="of all packets, where the kernel has netem")
    parser.add_argument("--keep", type=Path, help="a folder for runs and what they said, instead of a temporary one")
    asked = parser.parse_args(argv)
    asked.timeout_minutes = asked.timeout_minutes or TIMEOUT_MINUTES[asked.rollout]
    asked.cuts = known if "all" in asked.cuts else [] if "none" in asked.cuts else asked.cuts
    return asked


def main(argv: Sequence[str]) -> int:
    """Play what is asked for. Returns the exit status."""
    asked = parse(argv)
    steps = str(steps_for(len(asked.cuts)))
    flags = ("--steps", steps, *SMALL, *LAYOUTS[asked.layout], *(SGLANG if asked.rollout == "sglang" else ()))
    try:
        with two_hosts() as hosts, tempfile.TemporaryDirectory() as scratch:
            for host in hosts if asked.delay_ms or asked.loss_percent else ():
                host.slow_link(delay_ms=asked.delay_ms, loss_percent=asked.loss_percent)
            stand = Stand(hosts, (asked.keep or Path(scratch)).resolve(), flags, asked.timeout_minutes,
                          asked.stall_seconds, asked.rollout == "embedded")  # fmt: skip
            return _play(stand, asked.cuts)
    except NoHostsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _play(stand: Stand, names: Sequence[str]) -> int:
    if _show(play_main(stand)):
        return 1
    whole, cuts = stand.job("two-hosts"), [all_cuts()[name] for name in names if name != FULL]
    failed = _show(play_full(stand, whole)) if FULL in names else 0
    for told in play_cuts(stand, cuts, whole) if cuts else ():
        failed += _show(told)
    return min(failed, 1)


def _show(told: Told) -> int:
    took = "" if told.seconds is None else f", {told.seconds:.0f} s"
    print(f"{told.name}: {'not as it should be' if told.problems else 'well'}{took}; {told.line}", flush=True)
    for problem in told.problems:
        print(f"    {problem}", flush=True)
    return len(told.problems)


if __name__ == "__main__":
    # What was made has to go, whatever ends this; jobs in a shell's background ignore Ctrl-C.
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
