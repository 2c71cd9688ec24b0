"""The whole configuration of a discriminator's warm-start; defaults are the paper's (docs/method.md, section 4)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from prism_megatron.config.architecture.model import MiniWorld, ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import SAME_LAYOUT, DiscriminatorLayoutConfig, ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig, check_settled
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.engine.speed import SpeedConfig
from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, SHARE, OnResume
from prism_megatron.config.run import RunConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.validate import check_prompts, check_shared, check_values
from prism_megatron.errors import ConfigError

POOLED_LOAD_BALANCE = 0.01
"""The paper's coefficient of a loss over all layers together, whose balanced value is top_k."""


@dataclass(frozen=True)
class PairsConfig:
    """Where preference pairs come from when they are not sampled, and where sampled ones go."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    pairs: Path | None = None
    """file of preference pairs, JSON lines beside their images; without it the policy's samples against references"""
    write_pairs: Annotated[Path | None, OnResume.FREE] = None
    """file to write the sampled pairs to, with the images beside it, for a later --pairs"""


@dataclass(frozen=True)
class GateConfig:
    """What the trained discriminator must show on prompts it has not seen; a run that does not get there fails."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    min_auc: Annotated[float, SHARE] = 0.0
    """least share of (right, wrong) answers to one prompt that it ranks so, in each tower where it is known which is
    right; 0 asks for none"""
    min_accuracy: Annotated[float, SHARE] = 0.0
    """least share of pairs in which the reference scores higher, in each tower; 0 asks for none"""
    gate_prompts: Annotated[int, AT_LEAST_ONE] = 48
    """held-out prompts to measure both on, or as many as there are"""
    gate_rollouts: Annotated[int, AT_LEAST_ONE] = 8
    """answers sampled for each of them"""


@dataclass(frozen=True)
class WarmStartConfig:
    """Train a discriminator on preference pairs before the game: a reference should score above an answer."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    parallel: tyro.conf.OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)
    recompute: tyro.conf.OmitArgPrefixes[RecomputeConfig] = field(default_factory=RecomputeConfig)
    precision: tyro.conf.OmitArgPrefixes[PrecisionConfig] = field(default_factory=PrecisionConfig)
    speed: tyro.conf.OmitArgPrefixes[SpeedConfig] = field(default_factory=SpeedConfig)
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    pairs: tyro.conf.OmitArgPrefixes[PairsConfig] = field(default_factory=PairsConfig)
    rollout: tyro.conf.OmitArgPrefixes[RolloutConfig] = field(
        default_factory=lambda: RolloutConfig(prompts_per_step=128, rollouts_per_prompt=1)
    )
    discriminator: tyro.conf.OmitArgPrefixes[DiscriminatorConfig] = field(default_factory=DiscriminatorConfig)
    discriminator_layout: tyro.conf.OmitArgPrefixes[DiscriminatorLayoutConfig] = SAME_LAYOUT
    gate: tyro.conf.OmitArgPrefixes[GateConfig] = field(default_factory=GateConfig)
    checkpoint: tyro.conf.OmitArgPrefixes[CheckpointConfig] = field(default_factory=CheckpointConfig)
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    discriminator_optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="discriminator")] = field(
        default_factory=lambda: OptimizerConfig(lr=1e-5, schedule="cosine", warmup_ratio=0.1)
    )
    score_regulariser: Annotated[float, NOT_NEGATIVE] = 0.0
    """weight of the mean squared score in the loss"""
    prompts: Path | None = None
    """records to learn on, of those of --data, or scenes of the mini world, which then come again every epoch: lines of
    JSON with ids, as prism-align takes them"""
    steps: Annotated[int | None, AT_LEAST_ONE, OnResume.LONGER] = None
    """optimizer steps; by default one epoch of the pairs or records"""
    seed: int = 42
    """keys upcycling, sampling, dropout and the order of the data"""
    tokens_per_microbatch: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 16384
    """tokens, padding included, that one forward and backward pass holds at most; an answer that is longer with its
    reference runs alone"""

    def load_balance(self, num_layers: int) -> float:
        """The load-balancing coefficient per layer and tower of a discriminator of ``num_layers``.

        One that balances nothing is 0.
        """
        flags = self.discriminator
        if flags.load_balance is not None:
            return flags.load_balance
        nothing_to_balance = flags.routing == "dense" or flags.top_k == flags.experts_per_tower
        return 0.0 if nothing_to_balance else POOLED_LOAD_BALANCE * flags.top_k / num_layers


MINI_WARM_START = WarmStartConfig(
    data=DataConfig(system_prompt=None, max_response_tokens=96),
    rollout=RolloutConfig(prompts_per_step=16, rollouts_per_prompt=2),
    discriminator=DiscriminatorConfig(freeze_vision=True),
    gate=GateConfig(min_auc=0.8),
    checkpoint=CheckpointConfig(save_every=20),
    discriminator_optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", min_lr_ratio=0.1, warmup_ratio=0.1, beta2=0.95),
    score_regulariser=0.001,
    steps=40,
    tokens_per_microbatch=4096,
)

MINI_WARM_START_RECORDS = replace(
    MINI_WARM_START,
    # The mini knows scenes only: it first learns to keep the format on the set's images and questions. Its text is
    # spelled out byte by byte, hence longer answers.
    data=DataConfig(system_prompt=None, max_response_tokens=320, format_sft=150, format_sft_lr=2e-3),
    gate=GateConfig(),
)

MINI_WARM_START_PAIRS = replace(
    MINI_WARM_START,
    data=replace(MINI_WARM_START.data, max_response_tokens=320),
    rollout=RolloutConfig(prompts_per_step=16, rollouts_per_prompt=1),
    gate=GateConfig(),
    steps=None,
)


def mini_warm_start(mini: MiniWorld, *, records: bool = False, pairs: bool = False) -> WarmStartConfig:
    """A mini world's recipe: for its scenes, or for ``records`` or a file of ``pairs``."""
    recipe = MINI_WARM_START_RECORDS if records else MINI_WARM_START_PAIRS if pairs else MINI_WARM_START
    if mini == "drift":
        recipe = replace(
            recipe,
            model=ModelConfig(mini=mini),
            discriminator_optimizer=replace(recipe.discriminator_optimizer, lr=7e-4),
            steps=recipe.steps and 120,
        )
    return recipe


def check_warm_start(
    config: WarmStartConfig, shape: Qwen3VLShape, *, world_size: int, discriminator: Qwen3VLShape | None = None
) -> None:
    """All checks of a warm-start on ``world_size`` processes; shapes as in ``check_align``. Raises ConfigError."""
    pairs = config.pairs
    for name in ("logprob_gap_alarm", "rollout_probe_every", "rollout_probe_bound"):
        if getattr(config.rollout, name) != getattr(RolloutConfig(), name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} compares with a policy that trains, and here none does; leave it out")
    if config.precision.fp32_head and not config.data.format_sft:
        raise ConfigError("--fp32-head is for a policy that trains, and without --format-sft none does; leave it out")
    if config.model.freeze_policy_vision:
        raise ConfigError("--freeze-policy-vision is for a policy that trains, and here none does; leave it out")
    if pairs.pairs is not None:
        _check_pairs(config, pairs.pairs)
    else:
        _check_new_file(config)
    check_prompts(config.prompts)
    if pairs.pairs is None and config.steps is None and config.data.data is None:
        raise ConfigError("scenes have no end: say how many --steps to take, or name records with --data")
    check_values(config)
    check_settled(config.recompute)
    check_shared(config, shape, world_size=world_size, discriminator=discriminator)


def _check_new_file(config: WarmStartConfig) -> None:
    """What ``--write-pairs`` names must not be there; a run that goes on is asked when it has steps left."""
    path = config.pairs.write_pairs
    begins = config.checkpoint.load is None and config.run.resume != "auto"
    if path is not None and begins and path.exists():
        raise ConfigError(f"--write-pairs {path} exists; remove it, or give another file")


def _check_pairs(config: WarmStartConfig, path: Path) -> None:
    """What ``--pairs`` leaves no use for is refused."""
    if not path.is_file():
        raise ConfigError(f"--pairs {path} is not a file; give one that exists, or leave --pairs out")
    if config.data.data is not None:
        raise ConfigError("--pairs brings its own questions and images; leave --data out")
    if config.prompts is not None:
        raise ConfigError(
            "--prompts chooses among records or scenes, and --pairs brings its own; leave one of them out"
        )
    if config.pairs.write_pairs is not None:
        raise ConfigError("--write-pairs writes what was sampled, and with --pairs nothing is; leave one of them out")
    default = WarmStartConfig().rollout
    for name in ("rollout", "rollout_embedded_ranks", "rollouts_per_prompt", "temperature", "top_p"):
        if getattr(config.rollout, name) != getattr(default, name):
            raise ConfigError(f"--{name.replace('_', '-')} is for sampling, and with --pairs nothing is; leave it out")
    if config.gate.gate_rollouts != GateConfig().gate_rollouts:
        raise ConfigError("--gate-rollouts is for sampling, and with --pairs nothing is; leave it out")
    if config.gate.min_auc > 0:
        raise ConfigError("--min-auc needs answers that are known to be right or wrong, and --pairs has none; "
                          "leave it out, or ask for --min-accuracy")  # fmt: skip
