"""Damaged input at scale: ``python -m tests.fuzz --images 20000 --lines 10000``. Status 1 where any case failed.

A decoder that does not come back is killed, and its case is the last one that was printed.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import images, lines
from tests.fuzz.harness import SECONDS_A_CASE, Kind, fuzz

KINDS: dict[str, tuple[Kind, ...]] = {"images": (images.KIND,), "lines": (lines.RECORDS, lines.PAIRS)}
"""By the flag that says how many cases; they are shared equally by its kinds."""
_SHOWN = 40


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in KINDS:
        parser.add_argument(f"--{flag}", type=int, default=0, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failures = 0
    for flag, kinds in KINDS.items():
        for kind in kinds:
            count = getattr(arguments, flag) // len(kinds)
            if count:
                failures += _run(kind, count, seed=arguments.seed)
    return 1 if failures else 0


def _run(kind: Kind, count: int, *, seed: int) -> int:
    began = time.monotonic()

    def on_case(number: int) -> None:
        faulthandler.dump_traceback_later(10 * SECONDS_A_CASE, exit=True)
        if number % 1000 == 0:
            print(f"{kind.name}: {number} of {count} after {time.monotonic() - began:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(kind, count, seed=seed, folder=Path(folder), on_case=on_case)
    faulthandler.cancel_dump_traceback_later()
    print(f"{kind.name}: {outcome.text}, {time.monotonic() - began:.0f} s in all", flush=True)
    for failure in outcome.failures[:_SHOWN]:
        print(f"  {failure[:300]}", flush=True)
    return len(outcome.failures)


if __name__ == "__main__":
    sys.exit(main())
