"""Checks that need no process group and no torch: each complaint names the flag, the reason and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.forecast import check_forecast
from prism_megatron.config.engine.parallel import DiscriminatorLayoutConfig, ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig, check_precision
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.engine.speed import SpeedConfig, check_speed, check_speed_of_experts
from prism_megatron.config.engine.validate_layout import check_layout, check_world
from prism_megatron.config.fields import check_fields
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.discriminator import (
    DiscriminatorConfig,
    check_kind,
    check_router_losses,
    check_upcycling,
)
from prism_megatron.config.stages.exam import check_exam
from prism_megatron.config.stages.objective import check_correction
from prism_megatron.config.stages.validate_game import check_game
from prism_megatron.errors import ConfigError, listed


class TrainsDiscriminator(Protocol):
    """The sections that all stages have which train a discriminator on what a policy samples."""

    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def recompute(self) -> RecomputeConfig: ...
    @property
    def precision(self) -> PrecisionConfig: ...
    @property
    def speed(self) -> SpeedConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def discriminator(self) -> DiscriminatorConfig: ...
    @property
    def discriminator_layout(self) -> DiscriminatorLayoutConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def tokens_per_microbatch(self) -> int: ...


def check_align_values(config: AlignConfig) -> None:
    """Raise ConfigError for a value that no model and no world could use, or for a folder that is not there."""
    check_values(config)
    check_forecast(config.forecast, config.recompute)
    check_game(config.game)
    check_prompts(config.prompts)
    check_correction(config.correction, top_p=config.rollout.top_p)
    check_exam(config.exam, config.rewards)


def check_values(config: TrainsDiscriminator) -> None:
    """:func:`check_align_values` of what the stages have in common."""
    check_fields(config)
    check_data(config.data)
    check_speed(config.speed, distributed_optimizer=config.parallel.distributed_optimizer)
    discriminator = config.discriminator
    check_kind(discriminator)
    check_upcycling(discriminator)
    check_router_losses(discriminator, load_balance=discriminator.load_balance or 0.0)


def check_data(data: DataConfig) -> None:
    """Raise ConfigError for what is said of records where there are none.

    And for bad records that are to be skipped and could not all be known before the first step.
    """
    if data.format_sft and data.data is None:
        raise ConfigError("--format-sft trains on records; name their folder with --data, or leave --format-sft out")
    if data.on_bad == "skip" and data.check_images != "all":
        raise ConfigError(
            f"--on-bad skip leaves out what is bad before the first step, and --check-images {data.check_images} finds "
            "damaged images only at their step; use --check-images all, or --on-bad fail"
        )


def check_format_sft(data: DataConfig, rollout: RolloutConfig, data_parallel: int) -> None:
    """Raises ConfigError where ranks would have other shares of a step on the answers' form."""
    prompts = rollout.prompts_per_step
    if data.format_sft and prompts % data_parallel:
        near = [rounds * data_parallel for rounds in (prompts // data_parallel, prompts // data_parallel + 1)]
        raise ConfigError(
            f"--format-sft takes --prompts-per-step {prompts} records a step, which must be a multiple of the "
            f"{data_parallel} data-parallel ranks; use {listed(count for count in near if count)}"
        )


def check_prompts(prompts: Path | None) -> None:
    """Raise ConfigError for a file of selected prompts that is not there."""
    if prompts is not None and not prompts.is_file():
        raise ConfigError(f"--prompts {prompts} is no file; prism-select-prompts writes one")


def check_rollout(rollout: RolloutConfig) -> None:
    """Raise ConfigError for flags of servers that nothing would use, or that do not go together."""
    _check_rollout_pairs(rollout)
    default = RolloutConfig()
    started = {"rollout_servers", "rollout_tp", "rollout_memory_fraction", "rollout_python", "rollout_interface"}
    attached = {"rollout_urls", "rollout_router", "rollout_return_minutes"}
    sync = {
        "rollout_sync",
        "rollout_bucket_mib",
        "rollout_master_address",
        "rollout_spool_every",
        "rollout_probe_every",
        "rollout_probe_bound",
        "rollout_timeout_minutes",
    }
    names = started | attached | sync | {"rollout_colocated"}
    given = {name for name in names if getattr(rollout, name) != getattr(default, name)}
    if rollout.rollout == "embedded":
        unused, reason = given, "needs --rollout sglang"
    elif rollout.rollout_urls:
        unused, reason = given & started, "starts servers, which --rollout-urls rules out"
    else:
        unused, reason = given & attached, "needs --rollout-urls, the servers that it is for"
    if rollout.rollout == "sglang" and rollout.rollout_embedded_ranks is not None:
        unused, reason = {"rollout_embedded_ranks"}, "needs --rollout embedded"
    if unused:
        raise ConfigError(f"--{min(unused).replace('_', '-')} {reason}")
    _check_sync(rollout, given)


def check_timeouts(rollout: RolloutConfig, parallel: ParallelConfig) -> None:
    """Raise ConfigError where ranks would give up on one that still samples: the error would name a collective."""
    of_rollout, of_ranks = rollout.rollout_timeout_minutes, parallel.distributed_timeout_minutes
    if rollout.rollout == "sglang" and of_ranks <= of_rollout:
        raise ConfigError(
            f"--distributed-timeout-minutes {of_ranks} must be more than --rollout-timeout-minutes {of_rollout}, or "
            "ranks give up on one that is still sampling"
        )


def _check_sync(rollout: RolloutConfig, given: set[str]) -> None:
    """Raise ConfigError for ways to hand weights over that the servers, or the other flags, rule out."""
    sync = rollout.rollout_sync
    if sync == "tensor" and rollout.rollout_tp > 1:
        raise ConfigError(
            f"--rollout-sync tensor would send all weights {rollout.rollout_tp} times, once for every GPU of "
            "--rollout-tp; use --rollout-sync disk or group"
        )
    if sync == "group" and rollout.rollout_colocated:
        raise ConfigError("--rollout-sync group needs GPUs of the servers' own; leave --rollout-colocated out")
    here = ("//127.", "//localhost", "//[::1]")
    distant = [url for url in rollout.rollout_urls if not any(mark in url for mark in here)]
    if sync == "ipc" and distant:
        raise ConfigError(
            f"--rollout-sync ipc: {distant[0]} is no server of this host, and handles of GPU memory do not leave it; "
            "use --rollout-sync disk or group"
        )
    if sync == "disk" and "rollout_spool_every" in given:
        raise ConfigError("--rollout-sync disk hands every version over in a folder; leave --rollout-spool-every out")
    if sync == "disk" and "rollout_bucket_mib" in given:
        raise ConfigError("--rollout-bucket-mib is for weights in pieces; leave it out with --rollout-sync disk")
    if sync != "group" and "rollout_master_address" in given:
        raise ConfigError("--rollout-master-address needs --rollout-sync group")
    if rollout.rollout_probe_every == 0 and "rollout_probe_bound" in given:
        raise ConfigError("--rollout-probe-bound is for the probe, which --rollout-probe-every 0 turns off")


def _check_rollout_pairs(rollout: RolloutConfig) -> None:
    ahead = f"--rollout-ahead {rollout.rollout_ahead} generates while a step trains"
    if rollout.rollout == "embedded" and rollout.rollout_ahead:
        raise ConfigError(
            f"{ahead}, and with --rollout embedded the ranks that train are those that generate; use --rollout sglang, "
            "or leave it out"
        )
    if rollout.rollout_colocated and rollout.rollout_ahead:
        raise ConfigError(
            f"{ahead}, and with --rollout-colocated the servers have released their memory then; leave one of them out"
        )
    if rollout.rollout_colocated and rollout.rollout_router is not None:
        raise ConfigError("--rollout-router takes sleeping servers for dead; leave it or --rollout-colocated out")


def check_recompute(recompute: RecomputeConfig) -> None:
    """Raise ConfigError for modules named where nothing is chosen by module."""
    if recompute.recompute_modules and recompute.recompute not in {"selective", "auto"}:
        raise ConfigError(
            f"--recompute-modules {' '.join(recompute.recompute_modules)} needs --recompute selective, "
            f"not {recompute.recompute}"
        )


def check_align(
    config: AlignConfig, shape: Qwen3VLShape, *, world_size: int, discriminator: Qwen3VLShape | None = None
) -> None:
    """All checks of an alignment run on ``world_size`` processes. Raises ConfigError.

    ``shape`` is the policy's, ``discriminator`` that of the model in ``--discriminator``.
    """
    check_align_values(config)
    check_shared(config, shape, world_size=world_size, discriminator=discriminator)


def towers_layout(config: TrainsDiscriminator, shape: Qwen3VLShape | None = None) -> ParallelConfig | None:
    """How the discriminator's experts are split; None where it has none.

    Without the policy's ``shape`` it is taken for one with experts: ranks that hold the policy's layout as well hold
    that of a dense one.
    """
    if config.discriminator.routing == "dense":
        return None
    return config.discriminator_layout.of(
        config.parallel,
        experts_per_tower=config.discriminator.experts_per_tower,
        beside_experts=shape is None or shape.text.experts is not None,
    )


def check_shared(
    config: TrainsDiscriminator, shape: Qwen3VLShape, *, world_size: int, discriminator: Qwen3VLShape | None
) -> None:
    """:func:`check_align` of what the stages have in common, values aside. Raises ConfigError."""
    check_recompute(config.recompute)
    check_rollout(config.rollout)
    check_timeouts(config.rollout, config.parallel)
    if shape.text.num_experts and discriminator is None:
        raise ConfigError(
            f"--model has {shape.text.num_experts} experts, and a discriminator is upcycled from a dense model only; "
            "make one of a dense Qwen3-VL with the same tokenizer by `prism-convert to-megatron --as "
            "discriminator`, and name it with --discriminator"
        )
    routed = config.discriminator.routing != "dense"
    experts_per_tower = config.discriminator.experts_per_tower if routed else 0
    check_layout(
        config.parallel,
        shape,
        experts_per_tower=experts_per_tower,
        discriminator=discriminator,
        discriminator_layout=config.discriminator_layout,
    )
    towers = towers_layout(config, shape)
    split = (config.parallel if shape.text.num_experts else None, towers)
    check_speed_of_experts(config.speed, [layout for layout in split if layout is not None])
    dtype = shape.dtype if config.model.dtype == "auto" else config.model.dtype
    check_precision(config.precision, config.parallel, shape, dtype=dtype)
    if discriminator is not None:
        try:
            check_precision(config.precision, config.parallel, discriminator, dtype=dtype)
        except ConfigError as error:
            raise ConfigError(f"--discriminator: {error}") from error
    data_parallel = check_world(config.parallel, world_size, towers=towers)
    check_format_sft(config.data, config.rollout, data_parallel)
    pp, vpp = config.parallel.pp, config.parallel.vpp
    if vpp > 1 and config.data.format_sft:
        raise ConfigError(
            f"--vpp {vpp} needs a multiple of --pp {pp} micro-batches, and --format-sft has one; leave --format-sft "
            "out or use --vpp 1"
        )
