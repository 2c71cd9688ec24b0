"""Everything that a registration's seeds came to: levels of all arms, paired differences, the primary comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_megatron.config.experiments.effect import ALIGN, BASE, REFERENCES, SFT, RegimeName, Registration
from prism_megatron.evaluation.bootstrap import Interval
from prism_megatron.evaluation.comparison import figure_text
from prism_megatron.experiments.effect.answers import CAPTION_RELIANCE, REASONING_RELIANCE, Answers
from prism_megatron.experiments.effect.seed import arm_name
from prism_megatron.experiments.effect.statistics import crossed_interval, verdict

SHOWN = ("answer right", "caption exact", "reasoning exact")
"""Measures of the tables of text; the document has all."""

ONE_SEED = "one seed, no claim"
RELIANCE = (CAPTION_RELIANCE, REASONING_RELIANCE)

Runs = Mapping[str, Mapping[int, Answers]]
"""By arm and seed."""


@dataclass(frozen=True)
class Pair:
    """Two arms to compare, on the seeds that both have."""

    above: str
    than: str
    why: str


def pairs_of(registered: Registration) -> list[Pair]:
    """All comparisons, each once, the primary ones first."""
    pairs: dict[tuple[str, str], Pair] = {}
    for pair in _all_pairs(registered):
        pairs.setdefault((pair.above, pair.than), pair)
    return list(pairs.values())


def _all_pairs(registered: Registration) -> Iterator[Pair]:
    primary = registered.primary
    if primary.regime is None:
        yield Pair(primary.above, primary.than, why="primary")
    else:
        for algo in registered.algorithms:
            above, than = (arm_name(start, algo, primary.regime) for start in (primary.above, primary.than))
            yield Pair(above, than, why="primary")
    for name, regime in registered.regimes.items():
        if regime.seeds:
            yield from _after_rlvr(registered, name)
    yield Pair(SFT, BASE, why="fine-tuning")
    yield Pair(ALIGN, SFT, why="alignment")
    yield Pair(REFERENCES, SFT, why="training on alignment's references")
    yield Pair(ALIGN, REFERENCES, why="alignment beside training on its references")
    for arm, (_, control) in registered.aligned.items():
        if arm != ALIGN:
            yield Pair(ALIGN, arm, why="control" if control else "discriminator")
            yield Pair(arm, SFT, why="control alone" if control else "discriminator alone")
    if {"length", "random"} <= set(registered.controls):
        yield Pair(f"{ALIGN} random", f"{ALIGN} length", why="control beside control")


def _after_rlvr(registered: Registration, regime: RegimeName) -> Iterator[Pair]:
    for algo in registered.algorithms:
        for than in registered.reinforced:
            if than != ALIGN and ALIGN in registered.reinforced:
                yield Pair(arm_name(ALIGN, algo, regime), arm_name(than, algo, regime), why=f"after {algo}")
    for start, algo in registered.reinforced_in(regime):
        if start in registered.reinforced_once:
            yield Pair(arm_name(ALIGN, algo, regime), arm_name(start, algo, regime), why="discriminator, after RLVR")


def document_of(registered: Registration, runs: Runs, done: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """Figures as JSON has them."""
    levels = {
        arm: {
            mode: {measure: _plain(crossed_interval(_stacked(by_seed, mode, measure))) for measure in measures}
            for mode, measures in next(iter(by_seed.values())).items()
        }
        for arm, by_seed in runs.items()
    }
    commits = sorted({str(one["commit"]) for by_seed in done.values() for one in by_seed.values()})
    seconds = sum(one["train_seconds"] + one["ask_seconds"] for by_seed in done.values() for one in by_seed.values())
    return {
        "title": registered.title,
        "claims": len(registered.seeds) > 1,
        "commits": commits,
        "hours_of_arms": round(seconds / 3600, 2),
        "differences": [_difference(pair, runs) for pair in pairs_of(registered)],
        "levels": levels,
        "by_seed": {
            arm: {str(seed): _means(answers) for seed, answers in by_seed.items()} for arm, by_seed in runs.items()
        },
        "last_step": {
            arm: {str(seed): one["last_step"] for seed, one in by_seed.items()} for arm, by_seed in done.items()
        },
    }


def _difference(pair: Pair, runs: Runs) -> dict[str, Any]:
    first, second = runs[pair.above], runs[pair.than]
    seeds = [seed for seed in first if seed in second]
    found: dict[str, Any] = {"above": pair.above, "than": pair.than, "why": pair.why, "seeds": seeds}
    modes = next(iter(first.values()))
    for mode, measures in modes.items():
        for measure in measures:
            values = _stacked(first, mode, measure, seeds) - _stacked(second, mode, measure, seeds)
            interval, by_seed = crossed_interval(values), values.mean(axis=1)
            found[f"{mode}/{measure}"] = _plain(interval) | {
                "verdict": verdict(interval) if len(seeds) > 1 else ONE_SEED,
                "by_seed": [round(float(value), 4) for value in by_seed],
                "seed_std": round(float(by_seed.std(ddof=1)), 4) if len(seeds) > 1 else None,
            }
    return found


def _stacked(
    by_seed: Mapping[int, Answers], mode: str, measure: str, seeds: Sequence[int] | None = None
) -> npt.NDArray[np.float64]:
    """``[seeds, scenes]``, samples of a scene averaged."""
    return np.stack([by_seed[seed][mode][measure].mean(axis=1) for seed in seeds or by_seed])


def _means(answers: Answers) -> dict[str, float]:
    return {
        f"{mode}/{measure}": round(float(values.mean()), 4)
        for mode, measures in answers.items()
        for measure, values in measures.items()
    }


def _plain(interval: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in interval._asdict().items()}


def text_of(registered: Registration, document: Mapping[str, Any]) -> str:
    """The same as Markdown; of the measures, those of content."""
    lead = (
        f"Seeds {', '.join(map(str, registered.seeds))}; {registered.scenes} held-out scenes; {registered.samples} "
        "answers to each at temperature 1. Means with 95 % bootstrap intervals over seeds and scenes. "
        f"{document['hours_of_arms']:.1f} hours of arms that ended; commit {', '.join(document['commits'])}."
    )
    lines = [f"# {registered.title}", "", lead]
    if not document["claims"]:
        lines += ["", "**One seed: no claim.** Intervals are over scenes alone; another seed may come out otherwise."]
    lines += ["", *_primary(registered, document["differences"])]
    lines += ["", "## Comparisons", "", *_differences(registered, document["differences"]), ""]
    for mode in ("greedy", "T=1"):
        extra = [measure for measure in RELIANCE if mode == "greedy"]
        heads = [*SHOWN, "tokens", "nats a token", *extra]
        lines += [f"## Levels, {mode}", "", f"| arm | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for arm, level in document["levels"].items():
            cells = [figure_text(_interval(level[mode][measure])) for measure in SHOWN]
            form = f"{level[mode]['tokens']['mean']:.1f} | {level[mode]['nats a token']['mean']:.3f}"
            reliance = "".join(f" | {figure_text(_interval(level[mode][measure]))}" for measure in extra)
            lines.append(f"| {arm} | {' | '.join(cells)} | {form}{reliance} |")
        lines.append("")
    return "\n".join(lines)


def _primary(registered: Registration, differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was registered to decide, and whether all of it came out: then no correction for several is needed."""
    primary = registered.primary
    what = f"{primary.mode}/{primary.measure}"
    decisive = [one for one in differences if one["why"] == "primary"]
    lines = ["## Primary", "", f"{primary.measure[0].upper()}{primary.measure[1:]}, {primary.mode}.", ""]
    for one in decisive:
        found = one[what]
        above = f"above in {sum(value > 0 for value in found['by_seed'])} of {len(found['by_seed'])} seeds"
        difference = f"{figure_text(_interval(found))}, {found['verdict']}"
        lines.append(f"* {one['above']} less {one['than']}: {difference}; {above}")
    verdicts = {one[what]["verdict"] for one in decisive}
    outcome = "no claim" if ONE_SEED in verdicts else "holds" if verdicts == {"above"} else "does not hold"
    return [*lines, "", f"**What was registered: {outcome}.**"]


def _differences(registered: Registration, differences: Sequence[Mapping[str, Any]]) -> list[str]:
    measure = registered.primary.measure
    lines = [
        f"{measure[0].upper()}{measure[1:]}, the first arm less the second.",
        "",
        "| | first | second | seeds | greedy | verdict | T=1 | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in differences:
        cells = []
        for mode in ("greedy", "T=1"):
            found = one[f"{mode}/{measure}"]
            cells += [figure_text(_interval(found)), found["verdict"]]
        lines.append(f"| {one['why']} | {one['above']} | {one['than']} | {len(one['seeds'])} | {' | '.join(cells)} |")
    return lines


def _interval(plain: Mapping[str, Any]) -> Interval:
    return Interval(plain["mean"], plain["low"], plain["high"])
