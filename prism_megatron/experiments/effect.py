"""Does alignment do what it claims on scenes, and more than its controls? Several seeds, four arms, one table.

Arms: ``aligned``; ``lr0`` (the policy is never updated); ``random`` (the discriminator stays at random weights);
``shuffled`` (scores lose their owners inside each group). An effect counts only where it beats every control.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

from prism_megatron.config.experiments.effect import EffectConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.arm import ALIGNED, Arm
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import start, stop
from prism_megatron.evaluation.comparison import figure_text
from prism_megatron.evaluation.health import Figures
from prism_megatron.experiments.played import play
from prism_megatron.sampling.scene_answers import (
    MEASURES,
    MODES,
    Responses,
    Table,
    change,
    heldout_scenes,
    level,
    tabulate,
)


def measure_effect(config: EffectConfig, arms: Sequence[Arm]) -> None:
    """Run every arm and seed in one world and write ``effect.json`` and ``effect.md`` under ``config.output``."""
    world = start(arms[0].config.parallel, seed=arms[0].config.seed)
    examples = heldout_scenes(Renderer.from_folder(MINI_FOLDER / "policy"), count=config.scenes, seed=0)
    before: list[Responses] = []
    after: dict[str, list[Responses]] = {arm.name: [] for arm in arms}
    games: dict[str, list[Figures]] = {arm.name: [] for arm in arms}
    started = time.monotonic()
    for seed in range(config.seeds):
        for arm in arms:
            known = before[seed] if len(before) > seed else None
            played = play(arm, examples, seed=seed, steps=config.steps, world=world, before=known)
            if known is None:
                before.append(played.before)
            after[arm.name].append(played.after)
            games[arm.name].append(played.last)
            if world.is_main:
                print(f"seed {seed} {arm.name}: done after {time.monotonic() - started:.0f} s", flush=True)
    if world.is_main:
        _write(config, tabulate(before), {name: tabulate(runs) for name, runs in after.items()}, games)
    stop(world)


def _write(
    config: EffectConfig, before: Table, after: Mapping[str, Table], games: Mapping[str, Sequence[Figures]]
) -> None:
    controls = [name for name in after if name != ALIGNED]
    result: dict[str, object] = {
        "seeds": config.seeds,
        "steps": config.steps,
        "scenes": config.scenes,
        "last_step": games,
    }
    title = f"Alignment on {config.scenes} held-out scenes, {config.seeds} seeds, {config.steps} steps"
    lines = [
        f"{title}; mean and 95 % bootstrap interval over scenes.",
        "",
        "| sampling | measure | before | "
        + " | ".join(after)
        + " | aligned − control (the weakest of three) | effect |",
        "|---" * (5 + len(after)) + "|",
    ]
    for mode in MODES:
        for measure in MEASURES:
            aligned = after[ALIGNED][mode][measure]
            margins = {name: change(aligned, after[name][mode][measure]) for name in controls}
            weakest = min(margins.values(), key=lambda margin: margin.low)
            result[f"{mode}/{measure}"] = {
                "before": level(before[mode][measure]),
                **{name: level(table[mode][measure]) for name, table in after.items()},
                "aligned_minus_before": change(aligned, before[mode][measure])._asdict(),
                "aligned_minus_control": {name: margin._asdict() for name, margin in margins.items()},
            }
            lines.append(
                f"| {mode} | {measure} | {figure_text(level(before[mode][measure]))} | "
                + " | ".join(figure_text(level(table[mode][measure])) for table in after.values())
                + f" | {figure_text(weakest)} | "
                + ("yes |" if weakest.low > 0 else "no |")
            )
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "effect.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(lines) + "\n"
    (config.output / "effect.md").write_text(table, encoding="utf-8")
    print(table, flush=True)
