"""What a run is played or taught on: scenes of the mini world, or records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.exam import ExamConfig
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.data.admission import Checks, Look
from prism_megatron.data.loader import Example, RecordSource, SceneSource
from prism_megatron.data.pictures.files import Seen, look_at
from prism_megatron.data.reading.intake import NOT_CHECKABLE, Counts
from prism_megatron.data.records import Part, Record
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet, selected_scenes
from prism_megatron.data.scenes import Split
from prism_megatron.data.selection import Selection
from prism_megatron.engine.runtime import World
from prism_megatron.observability.activity import Activity
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.rewards.check import is_checkable


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
    checkable: Callable[[Record], bool] | None = None,
    selection: Selection | None = None,
) -> SceneSource | SceneSet | RecordSource:
    """Records of ``--data`` of their ``part``, or without it the ``scenes`` of that split of a mini world.

    ``answers_alone``: records are asked for their answer, and need no caption; of these ``checkable`` ones alone. With
    a ``selection`` its prompts alone are used, and scenes come again every epoch.

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
        checkable=checkable,
        selection=selection,
        checks=checks,
    )


def build_held_out(
    exam: ExamConfig,
    rewards: RewardsConfig,
    data: DataConfig,
    renderer: Renderer,
    *,
    mini: MiniWorld,
    seed: int,
    checks: Checks,
    say: Callable[[str], None],
) -> list[Example]:
    """Prompts that no step asks, as many as the ``exam`` wants or as there are; ``say`` is told how many those are.

    Records are asked for their answer alone, and only where it can be checked, by rules or by a ``--reward``.
    Raises DataError as ``build_prompts``: NothingLeftError where no such record is held out.
    """
    if not exam.eval_prompts:
        return []
    source = build_prompts(
        data, renderer, scenes="heldout", part="validation", mini=mini, batch_size=exam.eval_prompts, seed=seed,
        checks=checks, answers_alone=True, checkable=None if rewards.reward else _is_checkable,
    )  # fmt: skip
    asked, counts = exam.eval_prompts, source.counts
    if counts is not None:
        asked = min(asked, counts.kept)
        say_counts(None, counts, say)
        share = counts.kept / (counts.kept + counts.left_out.get(NOT_CHECKABLE, 0))
        say(f"held-out prompts: {asked} are asked; {share:.1%} of the records held out have an answer to check")
    return [source.example(number) for number in range(asked)]


def _is_checkable(record: Record) -> bool:
    return is_checkable(record.answer, record.answer_type)
