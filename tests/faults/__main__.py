"""``make faults``: kill, fill, cut and turn the clock of short runs at random, and see whether each goes on as itself.

A trial begins with the shortest run of a stage, on one rank or two, with embedded rollouts or fake servers. At a random
moment something befalls it; then the same command is started again until it is done. It passes if its rows and models
are, to the bit, those of a run that was left alone (with servers: if its rows make a whole), no process is left, and no
half-written folder stands under a final name. One JSON line a trial; status 1 where any failed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.campaign import Campaign


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--hours", type=float, help="begin trials for so long, however many they are")
    parser.add_argument("--seed", type=int, default=0, help="of the campaign")
    parser.add_argument("--replay", metavar="SEED", nargs="+", help="these trials alone, by the seeds of their lines")
    parser.add_argument("--folder", type=Path, help="a folder to work in; a temporary one by default")
    parser.add_argument("--log", type=Path, help="a file that gets the JSON lines too")
    options = parser.parse_args()
    campaign = Campaign(Path(tempfile.mkdtemp(prefix="faults-", dir=options.folder)), options.log)
    for seed in options.replay or _seeds(options):
        campaign.play(seed)
    return campaign.end()


def _seeds(options: argparse.Namespace) -> Iterator[str]:
    began = time.monotonic()
    for number in itertools.count():
        done = time.monotonic() - began >= 3600 * options.hours if options.hours else number >= options.trials
        if done:
            return
        yield f"{options.seed}-{number}"


if __name__ == "__main__":
    sys.exit(main())
