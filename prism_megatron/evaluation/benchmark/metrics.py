"""From the answers to a question to figures, and from figures of questions to means with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prism_megatron.evaluation.benchmark.answers import Answered, Item
from prism_megatron.evaluation.bootstrap import Interval, mean_interval

Figures = Mapping[str, float | None]
"""Of one question, by measure; None without data."""
GREEDY = "greedy/accuracy"


class Group(NamedTuple):
    """Questions that have something in common, by their place in the order of all."""

    by: str
    name: str
    members: Sequence[int]


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k of ``n`` samples, of which ``right`` are right, is right: 1 - C(n-c, k) / C(n, k).

    Unbiased for pass@k of the policy, as the share of groups of k with a right one is not where groups overlap: Chen et
    al. 2021, "Evaluating Large Language Models Trained on Code", equation 1. Raises ValueError for k above ``n``.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs {k} samples, and there are {n}")
    wrong = 1.0
    for taken in range(k):
        wrong *= max(0, n - right - taken) / (n - taken)
    return 1.0 - wrong


def majority(votes: Sequence[tuple[str, bool]]) -> float:
    """Is the most frequent answer right? ``votes`` are answers as plain text with whether each counts as right.

    Answers are told apart by their text alone: putting those together that the gold is equal to would help right ones.
    Where several are most frequent, one of them is drawn: the figure is the share of right ones. An empty answer has no
    vote, and without any vote the figure is 0. (Wang et al. 2023, self-consistency, majority vote.)
    """
    counts = Counter(answer for answer, _ in votes if answer)
    if not counts:
        return 0.0
    most = max(counts.values())
    leaders = {answer for answer, count in counts.items() if count == most}
    right = Counter(answer for answer, counts_as_right in votes if answer in leaders and counts_as_right)
    # The same text may count in one answer and not in another, which lacks the form.
    return sum(right[answer] / most for answer in leaders) / len(leaders)


def ks_of(samples: int) -> list[int]:
    """The k of which pass@k is told: powers of two from 2, and all."""
    powers = [2**i for i in range(1, 32) if 2**i < samples]
    return [*powers, samples] if samples > 1 else []


def figures_of(answers: Sequence[Answered]) -> dict[str, float | None]:
    """All measures of one question's answers. A failure is no answer: it is wrong, and not in the asked form."""
    greedy = [one for one in answers if one.mode == "greedy"]
    found = {"greedy/accuracy": _share([one.counts for one in greedy]), **_of_mode("greedy", greedy)}
    if sampled := [one for one in answers if one.mode == "sampled"]:
        total, right = len(sampled), sum(one.counts for one in sampled)
        found[f"sampled/mean@{total}"] = right / total
        found |= {f"sampled/pass@{k}": pass_at_k(total, right, k) for k in ks_of(total)}
        found[f"sampled/maj@{total}"] = majority([(one.answer, one.counts) for one in sampled])
        found |= _of_mode("sampled", sampled)
    return found


def _of_mode(mode: str, answers: Sequence[Answered]) -> dict[str, float | None]:
    lengths = [one.tokens for one in answers if not one.failure and one.tokens is not None]
    return {
        f"{mode}/right in any form": _share([one.right for one in answers]),
        f"{mode}/in the asked form": _share([one.valid for one in answers]),
        f"{mode}/truncated": _share([one.truncated for one in answers]),
        f"{mode}/tokens": sum(lengths) / len(lengths) if lengths else None,
        f"{mode}/failures": _share([bool(one.failure) for one in answers]),
    }


def _share(holds: Sequence[bool]) -> float:
    return sum(holds) / len(holds)


def heads_of(measures: Sequence[str]) -> list[str]:
    """The measures that are told of every group: those of right answers."""
    return [name for name in measures if name == GREEDY or "@" in name]


def groups_of(items: Sequence[Item]) -> list[Group]:
    """By set, source, kind and difficulty, wherever that tells questions apart; in the order in which they come."""
    found: list[Group] = []
    for by in ("set", "source", "kind", "difficulty"):
        members: dict[str, list[int]] = {}
        for place, item in enumerate(items):
            name = getattr(item, by)
            members.setdefault("not said" if name is None else name, []).append(place)
        same = {tuple(group.members) for group in found}
        if len(members) > 1 and not all(tuple(own) in same for own in members.values()):
            found += [Group(by, name, own) for name, own in members.items()]
    return found


def intervals_of(figures: Sequence[Figures], measures: Sequence[str]) -> dict[str, Interval | None]:
    """Means over questions with 95 % intervals (questions are resampled); None for a measure without data."""
    found: dict[str, Interval | None] = {}
    for measure in measures:
        values = [value for one in figures if (value := one[measure]) is not None]
        found[measure] = mean_interval(values, seed=0) if values else None
    return found


def summary_of(items: Sequence[Item], answers: Sequence[Sequence[Answered]]) -> dict[str, Any]:
    """All figures of an evaluation; nothing in it depends on when, or in how many tries, it was made."""
    figures = [figures_of(own) for own in answers]
    measures = list(figures[0])
    heads = heads_of(measures)
    failures = Counter(one.failure for own in answers for one in own if one.failure)
    return {
        "questions": len(items),
        "answers": sum(map(len, answers)),
        "failures": sum(failures.values()),
        "failed_because": dict(failures.most_common(5)),
        "figures": _plain(intervals_of(figures, measures)),
        "groups": [
            {
                "by": group.by,
                "name": group.name,
                "questions": len(group.members),
                "figures": _plain(intervals_of([figures[i] for i in group.members], heads)),
            }
            for group in groups_of(items)
        ],
    }


def _plain(intervals: Mapping[str, Interval | None]) -> dict[str, Any]:
    return {name: None if one is None else one._asdict() for name, one in intervals.items()}
