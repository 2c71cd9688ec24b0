"""Damaged input at scale: ``python -m tests.fuzz --images 20000 --lines 10000 --sets 10000``.

Status 1 where any case failed. A decoder that does not come back is killed, and its case is the last one that was
printed.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz import images, lines
from tests.fuzz.harness import SECONDS_A_CASE, Kind, fuzz
from tests.fuzz.sets import FORMATS, fuzz_sets

KINDS: dict[str, tuple[Kind, ...]] = {"images": (images.KIND,), "lines": (lines.RECORDS, lines.PAIRS)}
"""By the flag that says how many cases; they are shared equally by its kinds."""
_SHOWN = 40
_GROWTH_MIB = 100.0
"""By how much memory may grow after the warm-up, over all damaged sets of a format."""


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in KINDS:
        parser.add_argument(f"--{flag}", type=int, default=0, help="cases")
    parser.add_argument("--sets", type=int, default=0, help="damaged sets of records, shared equally by the formats")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failures = 0
    for flag, kinds in KINDS.items():
        for kind in kinds:
            count = getattr(arguments, flag) // len(kinds)
            if count:
                failures += _run(kind, count, seed=arguments.seed)
    if arguments.sets:
        failures += _run_sets(arguments.sets, seed=arguments.seed)
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


def _run_sets(count: int, *, seed: int) -> int:
    """Sets of all formats, each share of them a line, and a line of sums."""
    began, sums, failures = time.monotonic(), Counter[str](), 0
    for number, name in enumerate(FORMATS):
        share = count // len(FORMATS) + (number < count % len(FORMATS))

        def on_case(_number: int) -> None:
            faulthandler.dump_traceback_later(10 * SECONDS_A_CASE, exit=True)

        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz_sets(name, share, seed=seed, folder=Path(folder), on_case=on_case)
        faulthandler.cancel_dump_traceback_later()
        print(f"{name}: {tally.text}", flush=True)
        if tally.rss_last_mib > tally.rss_first_mib + _GROWTH_MIB:
            tally.failures.append(f"{name}: memory grew by more than {_GROWTH_MIB:.0f} MiB")
        for failure in tally.failures[:_SHOWN]:
            print(f"  {failure}", flush=True)
        sums.update(tally.outcomes)
        failures += len(tally.failures)
    skipped = sums["record"] + sums["image"]
    print(
        f"{count} damaged sets of {len(FORMATS)} formats: {sums['read']} records read, {skipped} skipped, "
        f"{sums['set']} sets refused by one error, {failures} failures, {time.monotonic() - began:.0f} s in all"
    )
    return failures


if __name__ == "__main__":
    sys.exit(main())
