"""What a run is played or taught on: scenes of the mini world, or records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.data.admission import Checks, Look
from prism_megatron.data.loader import RecordSource, SceneSource
from prism_megatron.data.pictures.files import Seen, look_at
from prism_megatron.data.reading.intake import Counts
from prism_megatron.data.records import Part
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet, selected_scenes
from prism_megatron.data.scenes import Split
from prism_megatron.data.selection import Selection
from prism_megatron.engine.runtime import World
from prism_megatron.observability.activity import Activity
from prism_megatron.parallel.collectives import all_gather_objects


def renderer_of(folder: Path, data: DataConfig) -> Renderer:
    """The one renderer of a run: prompts and references are made by it, and rollouts sampled from what it made.

    Raises DataError or ConfigError as ``Renderer.from_folder``.
    """
    return Renderer.from_folder(
        folder,
        system_prompt=data.system_prompt,
        strict_format=data.strict_format,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
    )


def look_together(world: World, activity: Activity) -> Look:
    """A look at image files that all ranks share, each at an equal part; all have the same answer.

    ``activity`` is told how far this rank is. Every rank calls it with the same files.
    """

    def look(paths: Sequence[Path], pixels: bool) -> Sequence[Seen]:
        mine = paths[world.rank :: world.world_size]
        with activity.phase("checking images"), activity.task("images", total=len(mine)) as advance:
            seen = all_gather_objects(look_at(mine, pixels=pixels, advance=advance))
        return [seen[i % world.world_size][i // world.world_size] for i in range(len(paths))]

    return look


def checks_of(data: DataConfig, look: Look) -> Checks:
    """What the flags say about bad records, with images seen by ``look``."""
    return Checks(data.check_images, data.on_bad, look)


def say_counts(train: Counts | None, held_out: Counts | None, say: Callable[[str], None]) -> None:
    """How many records each part uses and why others are not, a line each, and the first that are bad."""
    if train is not None:
        say(f"data: {train.text()}")
        for line in train.shown:
            say(f"left out: {line}")
    if held_out is not None:
        say(f"held-out data: {held_out.text()}")


def build_prompts(
    data: DataConfig,
    renderer: Renderer,
    *,
    scenes: Split,
    mini: MiniWorld,
    part: Part = "train",
    batch_size: int,
    seed: int,
    checks: Checks,
    answers_alone: bool = False,
    selection: Selection | None = None,
) -> SceneSource | SceneSet | RecordSource:
    """Records of ``--data`` of their ``part``, or without it the ``scenes`` of that split of a mini world.

    ``answers_alone``: records are asked for their answer, and need no caption. With a ``selection`` its prompts alone
    are used, and scenes come again every epoch.

    Raises DataError as ``RecordSource`` and ``selected_scenes``.
    """
    if data.data is None and selection is not None:
        chosen = selected_scenes(selection, split=scenes, mini=mini)
        return SceneSet(chosen, renderer, seed=seed, batch_size=batch_size)
    if data.data is None:
        return SceneSource(renderer, split=scenes, seed=seed, batch_size=batch_size, world=mini)
    return RecordSource(
        data.data,
        renderer,
        part=part,
        seed=seed,
        batch_size=batch_size,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
        answers_alone=answers_alone,
        selection=selection,
        checks=checks,
    )
