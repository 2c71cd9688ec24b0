"""Builds supervised fine-tuning from its configuration: what is learned from, by whom, in which order."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch

from prism_megatron.config.architecture.model import FAITHFUL_SHARE, FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.stages.demonstrations import DemonstrationsConfig
from prism_megatron.config.stages.sft import SFTConfig, times_of, weights_of
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.model_names import policy_folder, title_of
from prism_megatron.data.formats.detect import open_corpus
from prism_megatron.data.index.index import Index, open_index
from prism_megatron.data.index.samples import IndexedCorpus, Samples, repeats_by_weight, samples_of
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.records import Part
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.scenes import Split
from prism_megatron.data.stream.mixture import Mixture
from prism_megatron.data.stream.plan import Cost, Packing, Plan
from prism_megatron.data.stream.prefetch import Loader
from prism_megatron.data.teachers import SLOPPY_TEACHER
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.capabilities import check_adam
from prism_megatron.engine.host.execution import execution_here
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.runtime import World
from prism_megatron.errors import DataError
from prism_megatron.observability.model_flops import Arithmetic, Work
from prism_megatron.parallel.collectives import broadcast_object, on_main
from prism_megatron.run.driver import drive
from prism_megatron.run.exports import Exports
from prism_megatron.run.session import Session
from prism_megatron.sampling.handover import Handover
from prism_megatron.sampling.replicas import build_replica
from prism_megatron.sampling.scene_answers import heldout_scenes
from prism_megatron.stages.sft.demonstrations import (
    SCENES_PER_ROW,
    Demonstrations,
    RecordDemonstrations,
    SceneDemonstrations,
)
from prism_megatron.stages.sft.drift import Drift
from prism_megatron.stages.sft.plan import Learner, Lessons
from prism_megatron.stages.sft.stage import SFT
from prism_megatron.stages.sft.throughput import Throughput, peak_here
from prism_megatron.training.roles import batch_format, build_policy, model_files, resolve_dtype

_AHEAD = 2


def fine_tune_on(world: World, config: SFTConfig) -> None:
    """A whole run on a world that is there."""
    drive(world, config, build, kind=SFT.name)


def build(config: SFTConfig, session: Session) -> SFT:
    """The policy with loaded weights, and what it learns from.

    Raises ConfigError, DataError or ConversionError before anything is trained.
    """
    world = session.world
    text = f"building the policy on {world.world_size} ranks ({session.layout_text}); run folder {session.output}"
    with session.phase("build", text):
        return _build(config, session)


def _build(config: SFTConfig, session: Session) -> SFT:
    world, data = session.world, config.data
    # What a run's folder stands for may change between two ranks' looks at it.
    source = broadcast_object(policy_folder(config.model.model, of_the_mini="base", mini=config.model.mini), source=0)
    folder = files_folder(source, "policy")
    shape = Qwen3VLShape.from_folder(folder)
    dtype = resolve_dtype(config.model.dtype, shape)
    execution, capabilities = execution_here(
        config.recompute, config.precision, config.speed, world=world, dtype=dtype, say=session.say
    )
    renderer = Renderer.from_folder(
        folder, system_prompt=data.system_prompt, min_pixels=data.min_pixels, max_pixels=data.max_pixels
    )
    # What is learned from.
    if data.data:
        learned, held_out = _records(config, shape, renderer, session)
    else:
        learned, held_out = (_scenes(config, renderer, split, world) for split in ("sft", "heldout"))
    ends = [steps for steps in (config.steps, learned.num_steps) if steps is not None]
    assert ends, "the checks ask for --steps where there is no end"
    if config.steps is not None and config.steps > min(ends):
        session.say(f"the data of {data.epochs} epochs end after {min(ends):,} of --steps {config.steps}")
    # Who learns.
    policy = build_policy(
        source, shape, world=world, dtype=dtype, optimizer=config.policy, total_steps=min(ends), freeze=config.freeze,
        router_losses=config.experts.losses,
        execution=execution,
    )  # fmt: skip
    session.watch(policy)
    assert policy.optimizer is not None
    check_adam(capabilities, inner_optimizers(policy.optimizer))
    learner = Learner(
        policy,
        batch_format(renderer, world, execution),
        row_tokens=data.max_tokens if data.packing else None,
        rows_per_microbatch=data.rows_per_microbatch,
        eval_every=config.eval_every,
        save_every=config.checkpoint.save_every,
        eval_rows=config.eval_rows,
        vision_cache=config.vision_cache,
        throughput=_throughput(config, shape, dtype),
    )
    drift = _drift(config, policy, folder, renderer, dtype) if config.drift_scenes else None
    exports = Exports(
        {"policy": model_files(source, "policy", dtype=dtype)},
        title=f"Supervised fine-tuning of {title_of(config.model)}",
        trained="fine-tuned policy",
        renderer=renderer,
    )
    return SFT(learner, Lessons(learned, held_out, drift, steps=min(ends)), exports, session)


def _drift(config: SFTConfig, policy: MegatronEngine, folder: Path, renderer: Renderer, dtype: torch.dtype) -> Drift:
    examples = heldout_scenes(renderer, count=config.drift_scenes, seed=config.seed, world=config.model.mini)
    replica = build_replica(folder, renderer, world=policy.world, dtype=dtype)
    return Drift(Handover(policy, replica), examples, renderer, seed=config.seed)


def _throughput(config: SFTConfig, shape: Qwen3VLShape, dtype: torch.dtype) -> Throughput | None:
    """How fast steps are, where it is known how fast they could be; all ranks have the device of the first one."""
    peak = on_main(lambda: peak_here(dtype))
    if peak is None:
        return None
    return Throughput(Arithmetic.of(shape), shape.vision.merge, config.freeze, peak)


def _scenes(config: SFTConfig, renderer: Renderer, split: Split, world: World) -> Demonstrations:
    rows, per_row = config.data.rows_per_step, SCENES_PER_ROW if config.data.packing else 1
    mini = config.model.mini
    scenes = SceneSource(renderer, split=split, seed=config.seed, batch_size=rows * per_row,
                         teacher=SLOPPY_TEACHER[mini], faithful_share=FAITHFUL_SHARE, world=mini)  # fmt: skip
    return SceneDemonstrations(
        scenes, renderer, rows_per_step=rows, per_row=per_row, dp_rank=world.dp_rank, dp_size=world.dp_size
    )


def _records(
    config: SFTConfig, shape: Qwen3VLShape, renderer: Renderer, session: Session
) -> tuple[Demonstrations, Demonstrations | None]:
    """Those to learn from, and those held out, if there are any."""
    data = config.data
    render = ConversationRenderer(renderer, label_turns=data.labels)
    sets = [_indexed(path, config, render, session) for path in data.data]

    def of(part: Part) -> Demonstrations:
        return _planned(config, sets, part, render, shape=shape, filler_id=renderer.pad_token_id, session=session)

    learned = of("train")
    try:
        held_out = of("validation")
    except DataError as error:
        session.say(f"nothing is held out: {error}")
        return learned, None
    return learned, held_out


def _indexed(path: Path, config: SFTConfig, render: ConversationRenderer, session: Session) -> IndexedCorpus:
    """A set with its index, which the main rank makes where there is none; all ranks read the same files."""
    data = config.data
    corpus = open_corpus(path, config.format, purpose="train")

    def index() -> Index:
        return open_index(
            corpus,
            render,
            data.index or default_index_folder(),
            validation_share=data.validation_share,
            on_bad=data.on_bad,
            workers=data.readers * session.world.world_size,
            counting=session.activity,
        )

    with session.phase("index", f"looking at every record of {path}"):
        found = IndexedCorpus(corpus, on_main(index))
    session.say(f"data: {path}: {len(found.index):,} records are usable, {found.index.num_bad:,} are bad")
    return found


def default_index_folder() -> Path:
    """Where indices are kept for all runs of this user."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "prism_megatron" / "index"


def _planned(
    config: SFTConfig,
    sets: list[IndexedCorpus],
    part: Part,
    render: ConversationRenderer,
    *,
    shape: Qwen3VLShape,
    filler_id: int,
    session: Session,
) -> RecordDemonstrations:
    data, world, learns = config.data, session.world, part == "train"
    samples = samples_of(sets, part=part, max_tokens=data.max_tokens)
    # Lengths are planned as they are: a plan that knew of padding would be another one in another layout.
    packing = Packing(data.max_tokens if data.packing else None, 1)
    mixture = Mixture(samples, _times(data, samples) if learns else {}, seed=config.seed)
    plan = Plan(samples, mixture, packing=packing, seed=config.seed, epochs=data.epochs if learns else 1)
    if not plan.num_packs:
        raise DataError(f"--repeats and --weights leave nothing of {samples.counts.kept:,} records to an epoch")
    counts = samples.counts
    part_text = "learned from" if learns else "held out"
    session.say(
        f"data: {counts.kept:,} records are {part_text}, {counts.too_long:,} have more than {data.max_tokens} tokens"
    )
    loader = Loader(
        plan,
        render,
        cost=cost_of(shape, config.freeze),
        packs_per_step=data.rows_per_step,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        workers=data.readers if learns else 0,
        ahead=_AHEAD,
        on_bad=data.on_bad,
        filler_id=filler_id,
    )
    return RecordDemonstrations(plan, loader, rows_per_step=data.rows_per_step)


def _times(data: DemonstrationsConfig, samples: Samples) -> dict[str, float]:
    """How often an epoch shows the samples of each source. Raises DataError for a source that no sample has."""
    weights = weights_of(data)
    return repeats_by_weight(samples, weights) if weights else times_of(data)


def cost_of(shape: Qwen3VLShape, freeze: Collection[FreezeGroup]) -> Cost:
    """FLOPs of a step, by what an index knows of a sample: its tokens, and which of them are visual.

    Pairs of patches are not known and left out.
    """
    arithmetic, merge = Arithmetic.of(shape), shape.vision.merge

    def flops(work: Work) -> float:
        return arithmetic.training_flops(work, freeze=freeze, from_disk=0.0)

    return Cost(
        token=flops(Work(tokens=1)),
        token_pair=flops(Work(pairs=0.5)),
        visual_token=flops(Work(patches=merge**2, merged=1)),
    )
