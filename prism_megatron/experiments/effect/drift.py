"""How far every arm's answers are from the base's, from what fine-tuning taught and from the references."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prism_megatron.config.experiments.effect import BASE, Registration
from prism_megatron.evaluation.drift.compare import Embed, Plan, compare
from prism_megatron.evaluation.drift.responses import Responses, read_responses
from prism_megatron.experiments.effect.answers import RESPONSES
from prism_megatron.experiments.effect.seed import FAITHFUL, TAUGHT, arms_of, folder_of, texts_of

SHOWN = {
    "items": ("caption_items", "wasserstein"),
    "steps": ("reasoning_steps", "wasserstein"),
    "caption": ("caption", "mmd2"),
    "reasoning": ("reasoning", "mmd2"),
}
"""Distances of the table of text: of the form's counts, and of the words where embeddings are there."""
OTHERS = (BASE, TAUGHT, FAITHFUL)
_PLAN = Plan(permutations=99, most=1000)

Drift = dict[str, dict[str, dict[str, list[dict[str, float]]]]]
"""By arm, set and distance: one entry a seed, with the value and what relabelled texts have on average."""


def drift_of(output: Path, registered: Registration, embed: Embed | None, *, workers: int = 1) -> Drift:
    """Of one answer to each scene, at temperature 1; so many seeds at a time. Raises DataError for a damaged file."""
    found: Drift = {}
    with ThreadPoolExecutor(workers) as threads:  # what takes long are numpy's products
        for seed in threads.map(partial(_of_seed, output, registered, embed), range(len(registered.seeds))):
            for arm, other, name, value in seed:
                found.setdefault(arm, {}).setdefault(other, {}).setdefault(name, []).append(value)
    return found


def _of_seed(
    output: Path, registered: Registration, embed: Embed | None, place: int
) -> list[tuple[str, str, str, dict[str, float]]]:
    """Arm, the set that it is compared with, name and value of every distance."""
    seed = registered.seeds[place]
    others = [_read(folder_of(output, seed, BASE) / RESPONSES, BASE)]
    others += [_read(texts_of(output, seed, name), name) for name in (TAUGHT, FAITHFUL)]
    arms = [(arm, _read(folder_of(output, seed, arm) / RESPONSES, arm)) for arm in arms_of(registered, place)]
    return [
        (arm, other.name, name, value)
        for arm, own in arms
        for other in others
        if arm != other.name
        for name, value in _distances(own, other, embed).items()
    ]


def _read(path: Path, name: str) -> Responses:
    return read_responses(name, path, mode="sampled")


def _distances(own: Responses, other: Responses, embed: Embed | None) -> dict[str, dict[str, float]]:
    return {
        f"{one.what}/{one.kind}": {"value": round(one.distance.value, 6), "by_chance": round(one.distance.expected, 6)}
        for one in compare(own, other, embed, _PLAN)
        if one.distance is not None
    }


def lines_of(drift: Drift) -> list[str]:
    """A table of Markdown: means over those seeds of which enough answers are in the asked form."""
    heads = [f"{name}, {other}" for other in OTHERS for name in SHOWN]
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for arm, by_other in drift.items():
        cells = [_cell(by_other.get(other, {}), what, kind) for other in OTHERS for what, kind in SHOWN.values()]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _cell(distances: dict[str, list[dict[str, Any]]], what: str, kind: str) -> str:
    values = distances.get(f"{what}/{kind}")
    return "–" if values is None else f"{sum(one['value'] for one in values) / len(values):.3f}"
