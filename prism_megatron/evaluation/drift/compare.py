"""How far one set of responses is from another: the form of their texts, and where their texts lie.

Form is the paper's proxies, reasoning steps and caption items (PRISM, arXiv 2604.28123), and the number of words, as
distributions. Distances, tests and what they do not say: docs/drift.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prism_megatron.evaluation.drift.distances import jensen_shannon, mmd2, wasserstein_1
from prism_megatron.evaluation.drift.lengths import matched
from prism_megatron.evaluation.drift.relabelling import Array, Distance, TwoSamples, distance_of, independent, paired
from prism_megatron.evaluation.drift.responses import SEGMENTS, Responses
from prism_megatron.evaluation.proxies import count_items, count_steps

MIN_TEXTS = 20
"""Of each sample; with fewer nothing is measured."""

Kind = Literal["wasserstein", "jensen_shannon", "mmd2", "mmd2_same_length"]
Embed = Callable[[Sequence[str]], Array]


def num_words(text: str) -> int:
    """Runs of anything but white space."""
    return len(text.split())


PROXIES: dict[str, tuple[str, Callable[[str], int]]] = {
    "caption_items": ("caption", count_items),
    "reasoning_steps": ("reasoning", count_steps),
    "caption_words": ("caption", num_words),
    "reasoning_words": ("reasoning", num_words),
    "words": ("whole", num_words),
}
"""What is counted, and in which segment."""


@dataclass(frozen=True)
class Measured:
    """One distance of two sets. ``distance`` is None where either has too few texts.

    Example: ``Measured("reasoning_steps", "wasserstein", 300, 300, True, Distance(0.4, 0.1, 0.001), 4.0, 4.4)``.
    """

    what: str
    """a proxy, or a segment"""
    kind: Kind
    num_first: int
    num_second: int
    pairs: bool
    """whether both sets answer the same questions, and are compared question by question"""
    distance: Distance | None
    first_mean: float | None = None
    """of a proxy; of a segment its words"""
    second_mean: float | None = None


@dataclass(frozen=True)
class Plan:
    """How two sets are compared: relabellings, the most texts that each gives, and what draws are keyed by."""

    permutations: int = 999
    most: int = 2000
    seed: int = 42


@dataclass(frozen=True, eq=False)
class _Texts:
    """Of one segment, those of the first set before those of the second."""

    texts: list[str]
    samples: TwoSamples

    def is_enough(self) -> bool:
        return min(self.samples.num_first, self.samples.num_second) >= MIN_TEXTS


def compare(first: Responses, second: Responses, embed: Embed | None, plan: Plan) -> list[Measured]:
    """All distances of two sets: of proxies, and, with ``embed``, of segments, as they are and at equal lengths."""
    texts = {segment: _texts(first.of_segment(segment), second.of_segment(segment), plan) for segment in SEGMENTS}
    found: list[Measured] = []
    for proxy, (segment, count) in PROXIES.items():
        found += _of_proxy(proxy, texts[segment], count, plan)
    for segment in SEGMENTS if embed is not None else ():
        assert embed is not None
        found += _of_segment(segment, texts[segment], embed, plan)
    return found


def _texts(first: dict[str, str], second: dict[str, str], plan: Plan) -> _Texts:
    """Pairs where at least half of the smaller set's questions are the other's too; the others are then left out.

    Else the samples are independent, and of a question that both have, the second's answer is left out.
    """
    generator = np.random.default_rng(plan.seed)
    common = [id_ for id_ in first if id_ in second]
    if common and 2 * len(common) >= min(len(first), len(second)):
        ids = _drawn(common, plan.most, generator)
        return _Texts([first[id_] for id_ in ids] + [second[id_] for id_ in ids], paired(len(ids)))
    own = _drawn(list(first), plan.most, generator)
    other = _drawn([id_ for id_ in second if id_ not in first], plan.most, generator)
    return _Texts([first[id_] for id_ in own] + [second[id_] for id_ in other], independent(len(own), len(other)))


def _drawn(ids: list[str], most: int, generator: np.random.Generator) -> list[str]:
    if len(ids) <= most:
        return ids
    return [ids[number] for number in np.sort(generator.permutation(len(ids))[:most])]


def _of_proxy(proxy: str, texts: _Texts, count: Callable[[str], int], plan: Plan) -> list[Measured]:
    values_N = np.array([count(text) for text in texts.texts], dtype=np.float64)
    wasserstein = jensen = None
    if texts.is_enough():
        labels_P_N = texts.samples.relabelled(plan.permutations, seed=plan.seed)
        wasserstein = distance_of(wasserstein_1(values_N, labels_P_N))
        jensen = distance_of(jensen_shannon(values_N, labels_P_N))
    return [
        _measured(proxy, "wasserstein", texts.samples, wasserstein, values_N),
        _measured(proxy, "jensen_shannon", texts.samples, jensen, values_N),
    ]


def _of_segment(segment: str, texts: _Texts, embed: Embed, plan: Plan) -> list[Measured]:
    words_N = np.array([num_words(text) for text in texts.texts], dtype=np.float64)
    points_N_D = embed(texts.texts)
    kept_N, same_length = matched(texts.samples, [int(one) for one in words_N], seed=plan.seed)
    return [
        _discrepancy(segment, "mmd2", points_N_D=points_N_D, words_N=words_N, samples=texts.samples, plan=plan),
        _discrepancy(
            segment,
            "mmd2_same_length",
            points_N_D=points_N_D[kept_N],
            words_N=words_N[kept_N],
            samples=same_length,
            plan=plan,
        ),
    ]


def _discrepancy(
    segment: str, kind: Kind, *, points_N_D: Array, words_N: Array, samples: TwoSamples, plan: Plan
) -> Measured:
    found = None
    if min(samples.num_first, samples.num_second) >= MIN_TEXTS:
        found = distance_of(mmd2(points_N_D, samples.relabelled(plan.permutations, seed=plan.seed), samples))
    return _measured(segment, kind, samples, found, words_N)


def _measured(what: str, kind: Kind, samples: TwoSamples, distance: Distance | None, values_N: Array) -> Measured:
    sides = values_N[samples.is_first_N], values_N[~samples.is_first_N]
    means = [float(side.mean()) if len(side) else None for side in sides]
    return Measured(what, kind, samples.num_first, samples.num_second, samples.paired, distance, *means)
