"""``make defects``: put each known wrong edit into a copy of the tree and see whether the tests that it names notice.

Exits with 1 if an edit lives, applies no more, or is said to be equivalent and is not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.defects.catalogue import CatalogueError, Defect, load
from tests.defects.runner import Job, Run, copy_tree, preload, run_all, write_edit

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Parse, choose, run, print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.defects", description=__doc__)
    parser.add_argument("words", nargs="*", help="only entries whose name or file contains one of these")
    parser.add_argument("--catalogue", type=Path, action="append", help="a folder of TOML files instead of this one")
    parser.add_argument("--tests", nargs="*", help="run these instead of the tests that the entries name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one per core)")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="a run that takes longer counts as noticed")
    parser.add_argument("--keep-logs", type=Path, help="a folder for what every run printed")
    options = parser.parse_args()
    try:
        found = [defect for folder in options.catalogue or [None] for defect in (load(folder) if folder else load())]
        chosen = [d for d in found if not options.words or any(word in f"{d.name} {d.file}" for word in options.words)]
        edits = {defect.name: defect.edited(ROOT) for defect in chosen}
    except CatalogueError as error:
        print(error, file=sys.stderr)
        return 2
    if not chosen:
        print(f"none of {len(found)} entries has {' or '.join(options.words)} in its name or file", file=sys.stderr)
        return 2
    preload()
    with tempfile.TemporaryDirectory(prefix="defects-") as scratch:
        logs = options.keep_logs or Path(scratch) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        copies = [Path(scratch) / f"copy-{number}" / "main" for number in range(options.jobs)]
        shared = Path(os.environ.get("PRISM_SHARED", ROOT.parent / "shared"))
        for copy in copies:
            copy_tree(ROOT, copy)
            if shared.is_dir():
                (copy.parent / "shared").symlink_to(shared)
        tests_of = {defect.name: tuple(options.tests or defect.tests) for defect in chosen}
        if not _pass_unedited(sorted({test for tests in tests_of.values() for test in tests}), copies, logs, options):
            return 2
        jobs = [_job(defect, edits[defect.name], tests_of[defect.name]) for defect in chosen if tests_of[defect.name]]
        return _table(chosen, jobs, copies, logs, options)


def _pass_unedited(tests: Sequence[str], copies: Sequence[Path], logs: Path, options: argparse.Namespace) -> bool:
    """A test that fails without any edit notices nothing. Tests are run file by file."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    folder = logs / "unedited"
    folder.mkdir(exist_ok=True)
    jobs = [Job(file, tuple(names), _no_edit) for file, names in files.items()]
    ok = True
    for job, run in run_all(jobs, copies, folder, timeout_s=options.timeout_s * len(copies)):
        if run.status != 0:
            ok = False
            print(f"{job.name}: not passed without any edit (pytest's status {run.status})", file=sys.stderr)
            print("\n".join(run.log.read_text(errors="replace").splitlines()[-30:]), file=sys.stderr)
    return ok


def _no_edit(_copy: Path) -> Callable[[], None]:
    return lambda: None


def _job(defect: Defect, text: str, tests: tuple[str, ...]) -> Job:
    return Job(defect.name, tests, lambda copy: write_edit(copy / defect.file, text), len(tests) == 1)


def _table(
    defects: Sequence[Defect], jobs: Sequence[Job], copies: Sequence[Path], logs: Path, options: argparse.Namespace
) -> int:
    """Print a line for every entry as it ends, then the count of each verdict."""
    started = time.monotonic()
    by_name = {defect.name: defect for defect in defects}
    counts: Counter[str] = Counter()
    print(f"{'verdict':<11} {'s':>5}  where: what")
    unrun = [defect for defect in defects if not any(job.name == defect.name for job in jobs)]
    for defect in unrun:
        counts["equivalent"] += 1
        print(f"{'equivalent':<11} {'-':>5}  {defect.file}:{defect.line(ROOT)}: {defect.name}: {defect.equivalent}")
    for job, run in run_all(jobs, copies, logs, timeout_s=options.timeout_s):
        defect = by_name[job.name]
        verdict = verdict_of(defect, job.tests, run, any_test=options.tests is not None)
        counts[verdict] += 1
        print(
            f"{verdict:<11} {run.seconds:5.1f}  {defect.file}:{defect.line(ROOT)}: {defect.name}"
            + (f": {defect.equivalent}" if defect.equivalent else "")
            + (f" [{', '.join(job.tests)}; {run.log}]" if verdict not in {"caught", "hung", "equivalent"} else ""),
            flush=True,
        )
    real = sum(counts.values()) - counts["equivalent"]
    caught = counts["caught"] + counts["hung"]
    share = f" ({caught / real:.1%})" if real else ""
    print(f"{caught} of {real} caught{share}, {counts['equivalent']} equivalent; {time.monotonic() - started:.0f} s")
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return int(caught < real)


def verdict_of(defect: Defect, tests: Sequence[str], run: Run, *, any_test: bool) -> str:
    """One word: ``hung`` is noticed too, ``partly`` had named tests that passed, ``broken`` could run none."""
    if run.hung:
        return "hung"
    if run.status not in {0, 1}:
        return "broken"
    if defect.equivalent:
        return "equivalent" if run.status == 0 else "differs"
    if run.status == 0:
        return "lived"
    return "caught" if any_test or all(run.noticed_by(test) for test in tests) else "partly"


if __name__ == "__main__":
    sys.exit(main())
