"""The whole configuration of supervised fine-tuning. Field defaults are the paper's where it states them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import tyro

from prism_megatron.config.architecture.model import ALL_VISION, FreezeGroup, MiniWorld, ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.experts import PolicyExpertsConfig, check_policy_experts
from prism_megatron.config.engine.forecast import ForecastConfig, check_forecast
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig, check_precision
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.engine.speed import SpeedConfig, check_speed
from prism_megatron.config.engine.validate_layout import check_layout, check_world
from prism_megatron.config.engine.vision_cache import VisionCacheConfig, check_vision_cache
from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, ZERO_IS_OFF, OnResume, check_fields
from prism_megatron.config.formats import FormatConfig
from prism_megatron.config.run import RunConfig
from prism_megatron.config.stages.demonstrations import DemonstrationsConfig
from prism_megatron.config.validate import check_recompute
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations: the method's first stage."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    parallel: tyro.conf.OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)
    recompute: tyro.conf.OmitArgPrefixes[RecomputeConfig] = field(default_factory=RecomputeConfig)
    precision: tyro.conf.OmitArgPrefixes[PrecisionConfig] = field(default_factory=PrecisionConfig)
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    data: tyro.conf.OmitArgPrefixes[DemonstrationsConfig] = field(default_factory=DemonstrationsConfig)
    format: tyro.conf.OmitArgPrefixes[FormatConfig] = field(default_factory=FormatConfig)
    checkpoint: tyro.conf.OmitArgPrefixes[CheckpointConfig] = field(default_factory=CheckpointConfig)
    vision_cache: tyro.conf.OmitArgPrefixes[VisionCacheConfig] = field(default_factory=VisionCacheConfig)
    experts: tyro.conf.OmitArgPrefixes[PolicyExpertsConfig] = field(default_factory=PolicyExpertsConfig)
    speed: tyro.conf.OmitArgPrefixes[SpeedConfig] = field(default_factory=SpeedConfig)
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    forecast: tyro.conf.OmitArgPrefixes[ForecastConfig] = field(default_factory=ForecastConfig)
    policy: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="cosine", warmup_ratio=0.1)
    )
    freeze: tuple[FreezeGroup, ...] = ALL_VISION
    """parts of the model that stay as loaded (paper: the vision tower and the projector)"""
    steps: Annotated[int | None, AT_LEAST_ONE, OnResume.LONGER] = None
    """optimizer steps, at most those of --epochs, which are the default"""
    seed: int = 42
    """keys the order of the data"""
    eval_every: Annotated[int, ZERO_IS_OFF, OnResume.FREE] = 100
    """steps between losses on the held-out part, asked at every --save-every too; 0 asks at the end alone"""
    eval_rows: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 64
    """rows of the held-out part that are asked, over all data-parallel ranks, rounded up to whole --rows-per-step;
    those there are, where there are fewer"""
    drift_scenes: Annotated[int, NOT_NEGATIVE] = 0
    """held-out scenes of the mini world that the policy answers before the first step and after the last, to show how
    it drifts; every rank then holds a replica of it"""


def check_sft_values(config: SFTConfig) -> None:
    """Raise ConfigError for a value that no model and no world could use, or for data that are not there."""
    check_fields(config)
    check_forecast(config.forecast, config.recompute)
    data = config.data
    for path in data.data:
        if not path.exists():
            raise ConfigError(f"--data {path} does not exist; name a file or a folder of records (docs/data.md)")
    if config.model.freeze_policy_vision:
        raise ConfigError("--freeze-policy-vision is alignment's; name the parts with --freeze vision projector")
    if data.packing and data.rows_per_microbatch != 1:
        raise ConfigError(
            f"--rows-per-microbatch {data.rows_per_microbatch} is for --no-packing: a packed row is a micro-batch"
        )
    check_speed(config.speed, distributed_optimizer=config.parallel.distributed_optimizer)
    check_vision_cache(config.vision_cache, config.freeze)
    times_of(data)
    weights_of(data)
    if data.data and config.drift_scenes:
        raise ConfigError("--drift-scenes is for scenes of the mini world, and --data names records; leave it out")
    if not data.data:
        _check_scenes(config)
    elif not data.validation_share:
        _check_nothing_is_asked(config)


def times_of(data: DemonstrationsConfig) -> dict[str, float]:
    """How often an epoch shows each source that ``--repeats`` names. Raises ConfigError."""
    return _numbers("--repeats", data.repeats, wanted="SOURCE=TIMES expected, with a number from 0, such as public=0.5")


def weights_of(data: DemonstrationsConfig) -> dict[str, float]:
    """The weight of each source that ``--weights`` names; empty without the flag.

    Raises ConfigError, also where ``--repeats`` is given too, or no source has any weight.
    """
    weights = _numbers("--weights", data.weights, wanted="SOURCE=WEIGHT expected, with a number from 0, such as mine=3")
    if weights and data.repeats:
        raise ConfigError("--weights and --repeats both say how often sources are seen; give one of them")
    if weights and not sum(weights.values()):
        raise ConfigError("--weights gives every source the weight 0; give one of them more")
    return weights


def _numbers(flag: str, entries: tuple[str, ...], *, wanted: str) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not name or not 0.0 <= value < float("inf"):
            raise ConfigError(f"{flag} {entry}: {wanted}")
        if name in numbers:
            raise ConfigError(f"{flag} names {name!r} twice; say once how often it is seen")
        numbers[name] = value
    return numbers


def _check_scenes(config: SFTConfig) -> None:
    data, usual = config.data, (MINI_SFT.data, DemonstrationsConfig())
    if config.steps is None:
        raise ConfigError("scenes have no end: say how many --steps to take, or name demonstrations with --data")
    if config.format != FormatConfig():
        raise ConfigError("flags of a format are for --data, and without it scenes are made; leave them out")
    for name in ("repeats", "weights", "on_bad", "labels", "epochs", "index", "validation_share", "readers"):
        if getattr(data, name) not in [getattr(one, name) for one in usual]:
            raise ConfigError(f"--{name.replace('_', '-')} is for --data, and without it scenes are made; leave it out")


def _check_nothing_is_asked(config: SFTConfig) -> None:
    for name in ("eval_every", "eval_rows"):
        if getattr(config, name) not in (getattr(MINI_SFT_RECORDS, name), getattr(SFTConfig(), name)):
            raise ConfigError(
                f"--{name.replace('_', '-')} is about rows that are held out, and --validation-share 0 holds none out; "
                "leave one of them out"
            )


def check_sft(config: SFTConfig, shape: Qwen3VLShape, *, world_size: int) -> None:
    """All checks of a run on ``world_size`` processes with a policy of this ``shape``. Raises ConfigError."""
    check_sft_values(config)
    check_recompute(config.recompute)
    if "router" in config.freeze and not shape.text.num_experts:
        raise ConfigError("--freeze router is for models with experts, and --model has none; leave it out")
    check_policy_experts(config.experts, shape.text.experts, frozen="router" in config.freeze)
    check_layout(config.parallel, shape, experts_per_tower=0)
    dtype = shape.dtype if config.model.dtype == "auto" else config.model.dtype
    check_precision(config.precision, config.parallel, shape, dtype=dtype, packs=config.data.packing)
    data_parallel, data = check_world(config.parallel, world_size), config.data
    share = data_parallel * config.parallel.microbatches_of_a_rank * data.rows_per_microbatch
    if data.rows_per_step % share:
        raise ConfigError(
            f"--rows-per-step {data.rows_per_step} must be a multiple of {share}: of {data_parallel} data-parallel "
            f"ranks, each with whole rounds of micro-batches; use {-(-data.rows_per_step // share) * share}"
        )


MINI_SFT = SFTConfig(
    data=DemonstrationsConfig(system_prompt=None, max_tokens=256, rows_per_step=8, readers=0),
    checkpoint=CheckpointConfig(save_every=60),
    policy=OptimizerConfig(lr=1e-3, schedule="cosine", min_lr_ratio=0.05, warmup_ratio=0.05, beta2=0.95),
    steps=120,
    eval_every=20,
    eval_rows=16,
    drift_scenes=256,
)
"""The mini world's: scenes written about by its sloppy teacher."""

MINI_SFT_RECORDS = SFTConfig(
    data=DemonstrationsConfig(system_prompt=None, max_tokens=1024, rows_per_step=8, validation_share=0.1, readers=0),
    checkpoint=CheckpointConfig(save_every=60),
    policy=OptimizerConfig(lr=2e-3, schedule="cosine", min_lr_ratio=0.05, warmup_ratio=0.1, beta2=0.95),
    eval_every=20,
    eval_rows=32,
)
"""The mini on records: its text is spelled out byte by byte, hence long rows."""


def mini_sft(mini: MiniWorld, *, records: bool) -> SFTConfig:
    """A mini world's recipe, for its scenes or for ``records``."""
    return replace(MINI_SFT_RECORDS if records else MINI_SFT, model=ModelConfig(mini=mini))
