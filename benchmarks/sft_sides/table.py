"""From steps that were timed to the table, and to whether the limits hold. The standard library and nothing else.

A step is *clean* where its wall time is below 1.1 of its CPU time: nothing else was served meanwhile. Rates are those
of clean steps by the wall clock where every side has enough of them, else those of all steps by CPU time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.sft_sides.rounds import StepTaken

CLEAN = 1.1
ENOUGH = 5
WARM_UP = 3
LOSS_LIMIT = 1e-3


@dataclass(frozen=True)
class Limit:
    """Our rate must be so many times that of the fastest of these sides."""

    of: tuple[str, ...]
    at_least: float


@dataclass(frozen=True)
class Rate:
    """Tokens a second: median and quartiles."""

    median: float
    low: float
    high: float


def is_clean(step: StepTaken) -> bool:
    return step.wall < CLEAN * step.cpu


def by_wall(sides: Mapping[str, Sequence[StepTaken]]) -> bool:
    """Whether every side has enough clean steps behind its warm-up for the wall clock to be used."""
    return all(sum(map(is_clean, steps[WARM_UP:])) >= ENOUGH for steps in sides.values())


def rate(steps: Sequence[StepTaken], *, wall: bool) -> Rate:
    """Over clean steps by the wall clock, or over all by CPU time; the warm-up is left out."""
    counted = [step for step in steps[WARM_UP:] if not wall or is_clean(step)]
    rates = [step.tokens / (step.wall if wall else step.cpu) for step in counted]
    if len(rates) == 1:
        return Rate(rates[0], rates[0], rates[0])
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return Rate(median, low, high)


def differing(sides: Mapping[str, Sequence[StepTaken]]) -> str | None:
    """Where two sides did not train on the same tokens and labels, in words."""
    (first, theirs), *others = sides.items()
    for name, steps in others:
        for number, (one, other) in enumerate(zip(theirs, steps, strict=True)):
            if (one.tokens, one.labels, one.ids) != (other.tokens, other.labels, other.ids):
                return (
                    f"step {number} of {name} read {other.tokens} tokens (sum {other.ids}), {other.labels} labels; "
                    f"{first} {one.tokens} (sum {one.ids}), {one.labels}"
                )
    return None


def lines(
    sides: Mapping[str, Sequence[StepTaken]], *, ours: str, limits: Sequence[Limit], same_loss: Sequence[str]
) -> tuple[list[str], bool]:
    """The table of one model and precision, and whether all limits hold.

    ``same_loss`` are the sides whose last loss must be ours, and the twin of ours is among them.
    """
    wall = by_wall(sides)
    rates = {name: rate(steps, wall=wall) for name, steps in sides.items()}
    what = "wall clock of clean steps" if wall else "CPU time of all steps: too few were clean"
    text = [f"  {'':22} {'tokens/s':>8} {'[quartiles]':>16} {'clean':>7} {'ours is':>8} {'loss':>9}   ({what})"]
    for name, steps in sides.items():
        found, counted = rates[name], steps[WARM_UP:]
        spread = f"[{found.low:,.0f}-{found.high:,.0f}]"
        clean = f"{sum(map(is_clean, counted))}/{len(counted)}"
        text.append(
            f"  {name:22} {found.median:8,.0f} {spread:>16} {clean:>7} {rates[ours].median / found.median:7.2f}x "
            f"{steps[-1].loss:9.4f}"
        )
    holds = True
    for words, held in _judged(sides, rates, ours=ours, limits=limits, same_loss=same_loss):
        holds &= held
        text.append(f"  {words}: {'holds' if held else 'DOES NOT HOLD'}")
    return text, holds


def _judged(
    sides: Mapping[str, Sequence[StepTaken]],
    rates: Mapping[str, Rate],
    *,
    ours: str,
    limits: Sequence[Limit],
    same_loss: Sequence[str],
) -> Iterator[tuple[str, bool]]:
    for limit in limits:
        fastest = max(limit.of, key=lambda name: rates[name].median)
        ratio = rates[ours].median / rates[fastest].median
        yield f"{ratio:.2f} times as fast as {fastest} (limit {limit.at_least})", ratio >= limit.at_least
    mine = sides[ours][-1].loss
    apart = max(abs(sides[name][-1].loss - mine) for name in same_loss)
    yield (
        f"last losses of {', '.join(same_loss)} are within {apart:.1e} of ours (limit {LOSS_LIMIT:.0e})",
        apart <= LOSS_LIMIT,
    )
