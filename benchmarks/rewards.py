"""How many answers are checked a second, by kind, and what hostile ones cost.

    python benchmarks/rewards.py                     20,000 ordinary checks, 300 of LaTeX, 2,000 hostile ones
    python benchmarks/rewards.py --workers 1 2 4

Ordinary checks are what sets of visual questions ask for (choices, whole numbers, decimals, fractions, units, texts),
and a twentieth that needs algebra; hardly a pair stands twice. Processes are started before the clock. Exits with 1
where
fewer than 1,000 ordinary checks are done a second, or hostile ones take more than 90 s.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from prism_megatron.rewards.checker import Checker
from prism_megatron.rewards.verdict import Ask
from tests.unit.rewards.hostile import hostile_asks

ORDINARY_A_SECOND = 1000
HOSTILE_SECONDS = 90.0
WARM = [Ask(rf"\sqrt{{{number}}}", r"\sqrt{2}") for number in range(3, 99)]


def latex_asks(count: int, draw: random.Random) -> list[Ask]:
    """Right and wrong expressions, all different, of which each needs both its texts parsed."""
    asks = []
    for number in range(count):
        a, b = draw.randint(2, 999), number + 2
        gold = rf"\frac{{{a}\pi}}{{{b}}}"
        asks.append(draw.choice([Ask(rf"{a}\pi/{b}", gold), Ask(rf"\frac{{{a + 1}\pi}}{{{b}}}", gold)]))
        asks[-1] = draw.choice([asks[-1], Ask(rf"(x+{a})^2+{b}", rf"x^2+{2 * a}x+{a * a + b}")])
    return asks


def ordinary_asks(count: int, draw: random.Random) -> list[Ask]:
    """Answers as policies give them, half of them right."""
    asks = latex_asks(count // 20, draw)
    for number in range(count - len(asks)):
        value = draw.randint(-999, 99_999)
        said = value + draw.choice([0, 0, 1])
        asks.append(
            (
                Ask(draw.choice("ABCD"), draw.choice("ABCD"), "choice"),
                Ask(str(said), str(value), "integer"),
                Ask(f"{said / 100:.2f}", f"{value / 100:.2f}", "float"),
                Ask(rf"\frac{{{said}}}{{{number + 1}}}", f"{value}/{number + 1}", "text"),
                Ask(f"{said} cm", f"{value} cm"),
                Ask(f"({said}, {number})", f"({value},{number})"),
                Ask(f"the {said}th shape", f"{value}th shape", "text"),
                Ask(draw.choice(["true", "false"]), draw.choice(["true", "false"]), "bool"),
            )[number % 8]
        )
    draw.shuffle(asks)
    return asks


def play(checker: Checker, asks: Sequence[Ask]) -> float:
    """Seconds until all are checked."""
    began = time.perf_counter()
    for future in checker.submit(asks):
        future.result()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ordinary", type=int, default=20_000)
    parser.add_argument("--latex", type=int, default=300)
    parser.add_argument("--hostile", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    kept = True
    for workers in args.workers:
        draw = random.Random(0)
        with Checker(workers=workers) as checker:
            play(checker, WARM)
            ordinary, latex = ordinary_asks(args.ordinary, draw), latex_asks(args.latex, draw)
            rate = len(ordinary) / play(checker, ordinary)
            by_worker = checker.counts["by worker"] - len(WARM)
            algebra = len(latex) / play(checker, latex)
            seconds = play(checker, hostile_asks(args.hostile, seed=1))
            family = [psutil.Process(), *psutil.Process().children(recursive=True)]
            memory = sum(process.memory_info().rss for process in family) / 2**20
            killed = checker.counts["workers killed"]
        print(
            f"{workers} workers: {rate:.0f} ordinary checks a second ({by_worker} of {len(ordinary)} by a worker), "
            f"{algebra:.0f} of LaTeX alone, {args.hostile} hostile ones in {seconds:.1f} s ({killed} killed), "
            f"{memory:.0f} MiB resident in all",
            flush=True,
        )
        if workers >= 2:
            kept = kept and rate >= ORDINARY_A_SECOND and seconds <= HOSTILE_SECONDS
    print(f"limits are {'kept' if kept else 'NOT kept'}: {ORDINARY_A_SECOND} a second, {HOSTILE_SECONDS:.0f} s")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
