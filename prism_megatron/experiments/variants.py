"""The method's variants on the mini world, side by side: the same steps, scenes and draws, one flag apart.

Every kind of discriminator (routing, modality) is upcycled from the same policy and warmed up by the same recipe; the
variants of the game share the default kind. What is reported is what came out: no variant is chosen by it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.experiments.variants import VARIANTS, VariantsConfig, variant
from prism_megatron.config.stages.arm import Arm
from prism_megatron.config.stages.warm_start import MINI_WARM_START
from prism_megatron.data.render import Renderer
from prism_megatron.disk import write_atomically
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.evaluation.bootstrap import Interval, statistic_interval
from prism_megatron.evaluation.comparison import Comparison, Line, write_comparison
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.proxies import PROXIES, ResponseForm, wasserstein_1
from prism_megatron.experiments.played import play
from prism_megatron.parallel.collectives import barrier, broadcast_object
from prism_megatron.run.files import CONFIG, EXPORT, SUMMARY
from prism_megatron.sampling.scene_answers import (
    MEASURES,
    MODES,
    Responses,
    Table,
    change,
    heldout_scenes,
    level,
    reference_forms,
    tabulate,
)
from prism_megatron.stages.warm_start.build import warm_up_on
from prism_megatron.types import TOWER_NAMES

BEFORE = "before"


def measure_variants(config: VariantsConfig) -> None:
    """Play every variant and write ``variants.json`` and ``report.html`` under ``config.output``."""
    world = start(MINI_ALIGN.parallel, seed=0)
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    examples = heldout_scenes(renderer, count=config.scenes, seed=0)
    supervision = reference_forms(examples, renderer)
    runs: dict[str, list[Responses]] = {BEFORE: []}
    games: dict[str, list[Figures]] = {}
    held_out: dict[str, Any] = {}
    started = time.monotonic()
    for name in VARIANTS:
        arm, held_out[name] = with_warm_discriminator(Arm(name, variant(name)), config, world)
        runs[name], games[name] = [], []
        for seed in range(config.seeds):
            known = runs[BEFORE][seed] if len(runs[BEFORE]) > seed else None
            played = play(arm, examples, seed=seed, steps=config.steps, world=world, before=known)
            if known is None:
                runs[BEFORE].append(played.before)
            runs[name].append(played.after)
            games[name].append(played.last)
            if world.is_main:
                print(f"{name}, seed {seed}: done after {time.monotonic() - started:.0f} s", flush=True)
    if world.is_main:
        comparison = compare(config, runs, supervision, held_out)
        config.output.mkdir(parents=True, exist_ok=True)
        document = {"warm_start_held_out": held_out, "last_step": games, **comparison.as_document()}
        write_atomically(config.output / "variants.json", json.dumps(document, indent=2) + "\n")
        write_comparison(config.output / "report.html", comparison)
        print(comparison.as_text(), flush=True)
    stop(world)


def with_warm_discriminator(arm: Arm, config: VariantsConfig, world: World) -> tuple[Arm, Any]:
    """``arm`` with a discriminator of its kind, and that one's held-out figures.

    It is warmed up here unless the output folder has one already.
    """
    wanted = arm.config.discriminator
    output = config.output / f"warm-start-{wanted.routing}-{wanted.modality}"
    done, begun = broadcast_object(((output / SUMMARY).exists(), (output / CONFIG).exists()), source=0)
    if not done:
        kind = replace(MINI_WARM_START.discriminator, routing=wanted.routing, modality=wanted.modality)
        checkpoints = replace(MINI_WARM_START.checkpoint, output=output, load=output if begun else None)
        warm_up_on(
            world,
            replace(
                MINI_WARM_START,
                discriminator=kind,
                checkpoint=checkpoints,
                gate=replace(MINI_WARM_START.gate, min_auc=0.0),
                steps=config.warm_start_steps,
                parallel=arm.config.parallel,
            ),
        )
    barrier()  # the main rank writes the summary last
    held_out = json.loads((output / SUMMARY).read_text(encoding="utf-8"))["held_out"]
    warm = replace(wanted, discriminator=str(output / EXPORT))
    return replace(arm, config=replace(arm.config, discriminator=warm)), held_out


def compare(
    config: VariantsConfig,
    runs: Mapping[str, Sequence[Responses]],
    supervision: Sequence[ResponseForm],
    held_out: Mapping[str, Any],
) -> Comparison:
    """All figures, before and after: the known truth, its paired change, and the drift of the responses' form."""
    tables = {name: tabulate(of_run) for name, of_run in runs.items()}
    modes_and_measures = [(mode, measure) for mode in MODES for measure in MEASURES]
    levels = [
        Line(mode, measure, {name: level(table[mode][measure]) for name, table in tables.items()})
        for mode, measure in modes_and_measures
    ]
    changes = [
        Line(mode, measure, {name: _change(name, tables, mode, measure) for name in tables})
        for mode, measure in modes_and_measures
    ]
    means, spreads, distances = [], [], []
    for mode in MODES:
        for proxy in PROXIES:
            references = [float(getattr(form, proxy)) for form in supervision]
            away = partial(wasserstein_1, reference=references)
            values = {name: proxy_values(of_run, mode, proxy) for name, of_run in runs.items()}
            label = proxy.replace("_", " ")
            means.append(Line(mode, label, {name: _interval(own, np.mean) for name, own in values.items()}))
            spreads.append(Line(mode, label, {name: _interval(own, np.std) for name, own in values.items()}))
            distances.append(Line(mode, label, {name: _interval(own, away) for name, own in values.items()}))
    supervised = ", ".join(
        f"{np.mean([getattr(form, proxy) for form in supervision]):.2f} {proxy.replace('_', ' ')}" for proxy in PROXIES
    )
    return Comparison(
        title=f"Variants of alignment on the mini world, {config.steps} steps, {config.seeds} seed(s)",
        lead=f"{config.scenes} held-out scenes; means with 95 % bootstrap intervals over scenes. The supervision has "
        f"{supervised} a response.",
        columns={BEFORE: "the policy before alignment"}
        | {name: f"{' '.join(flags) or 'defaults'}; {_auc(held_out[name])}" for name, flags in VARIANTS.items()},
        sections={
            "Right against the known truth": levels,
            "Change from before, paired by scene": changes,
            "Form of valid responses, a response": means,
            "Spread of the form: standard deviation over responses": spreads,
            "Distance of the form from the supervision (1-Wasserstein)": distances,
        },
    )


def _change(name: str, tables: Mapping[str, Table], mode: str, measure: str) -> Interval | None:
    return None if name == BEFORE else change(tables[name][mode][measure], tables[BEFORE][mode][measure])


def proxy_values(runs: Sequence[Responses], mode: str, proxy: str) -> list[list[float]]:
    """One proxy of the valid responses to each scene, over the seeds."""
    return [
        [float(getattr(response.form, proxy)) for response in of_scene if response.form is not None]
        for of_scene in zip(*(run[mode] for run in runs), strict=True)
    ]


def _interval(values: list[list[float]], statistic: Callable[[np.ndarray], float]) -> Interval | None:
    return statistic_interval(values, statistic, seed=0) if any(values) else None


def _auc(held_out: Mapping[str, Any]) -> str:
    """How well the warm discriminator told right from wrong inside held-out groups (``game_row``), before the game."""
    figures = ((name, held_out[f"{name}/auc"]) for name in TOWER_NAMES)
    return "warm-start AUC " + ", ".join(f"{name} {'–' if auc is None else f'{auc:.3f}'}" for name, auc in figures)
