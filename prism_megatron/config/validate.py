"""Checks that need no process group and no torch: each complaint names the flag, the reason and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prism_megatron.config.align import AlignConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.data import DataConfig
from prism_megatron.config.discriminator import DiscriminatorConfig, check_kind, check_router_losses, check_upcycling
from prism_megatron.config.model import ModelConfig
from prism_megatron.config.optimizer import OptimizerConfig
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.config.precision import PrecisionConfig, check_precision
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.config.recompute import RecomputeConfig
from prism_megatron.config.rollout import RolloutConfig
from prism_megatron.config.validate_game import check_game
from prism_megatron.config.validate_layout import check_layout, check_world
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
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def discriminator(self) -> DiscriminatorConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def discriminator_optimizer(self) -> OptimizerConfig: ...
    @property
    def tokens_per_microbatch(self) -> int: ...


def check_align_ranges(config: AlignConfig) -> None:
    """Raise ConfigError for a value that no model and no world could use, or for a folder that is not there."""
    game = config.game
    check_ranges(config, steps=config.steps)
    check_interval("--alpha", game.alpha, at_least=0.0, at_most=1.0)
    check_interval("--score-clip", game.score_clip, above=0.0)
    check_interval("--score-regulariser", game.score_regulariser, at_least=0.0)
    check_interval("--format-penalty", game.penalty, at_least=0.0)
    check_game(game)
    _check_optimizer("policy", config.policy)


def check_ranges(config: TrainsDiscriminator, *, steps: int) -> None:
    """:func:`check_align_ranges` of what the stages have in common."""
    at_least_one = {
        "--tp": config.parallel.tp,
        "--pp": config.parallel.pp,
        "--vpp": config.parallel.vpp,
        "--cp": config.parallel.cp,
        "--ep": config.parallel.ep,
        "--etp": config.parallel.expert_tp,
        "--distributed-timeout-minutes": config.parallel.distributed_timeout_minutes,
        "--steps": steps,
        "--prompts-per-step": config.rollout.prompts_per_step,
        "--rollouts-per-prompt": config.rollout.rollouts_per_prompt,
        "--tokens-per-microbatch": config.tokens_per_microbatch,
        "--max-prompt-tokens": config.data.max_prompt_tokens,
        "--max-response-tokens": config.data.max_response_tokens,
        "--save-every": config.checkpoint.save_every,
        "--rollout-servers": config.rollout.rollout_servers,
        "--rollout-tp": config.rollout.rollout_tp,
        "--rollout-bucket-mib": config.rollout.rollout_bucket_mib,
        "--rollout-timeout-minutes": config.rollout.rollout_timeout_minutes,
    }
    if config.rollout.rollout_embedded_ranks is not None:
        at_least_one["--rollout-embedded-ranks"] = config.rollout.rollout_embedded_ranks
    for flag, count in at_least_one.items():
        if count < 1:
            raise ConfigError(f"{flag} {count} must be at least 1")

    discriminator = config.discriminator
    check_interval("--temperature", config.rollout.temperature, above=0.0)
    check_interval("--top-p", config.rollout.top_p, above=0.0, at_most=1.0)
    check_interval("--rollout-ahead", config.rollout.rollout_ahead, at_least=0)
    check_interval("--logprob-gap-alarm", config.rollout.logprob_gap_alarm, above=0.0)
    check_interval("--head-dropout", discriminator.head_dropout, at_least=0.0, below=1.0)
    not_negative = {
        "--format-sft": config.data.format_sft,
        "--upcycle-noise": discriminator.upcycle_noise,
        "--router-std": discriminator.router_std,
        "--load-balance": discriminator.load_balance or 0.0,
        "--router-z-loss": discriminator.router_z_loss,
    }
    check_interval("--format-sft-lr", config.data.format_sft_lr, above=0.0)
    _check_optimizer("discriminator", config.discriminator_optimizer)
    for flag, value in not_negative.items():
        check_interval(flag, value, at_least=0.0)
    check_kind(discriminator)
    check_upcycling(discriminator)
    check_router_losses(discriminator, load_balance=discriminator.load_balance or 0.0)
    for flag, folder in (
        ("--model", config.model.model),
        ("--data", config.data.data),
        ("--discriminator", discriminator.discriminator),
        ("--load", config.checkpoint.load),
    ):
        _check_folder(flag, folder)


def _check_optimizer(role: str, optimizer: OptimizerConfig) -> None:
    for name in ("lr", "weight_decay", "clip_grad", "warmup_steps"):
        check_interval(f"--{role}.{name.replace('_', '-')}", getattr(optimizer, name), at_least=0.0)
    check_interval(f"--{role}.eps", optimizer.eps, above=0.0)
    for name in ("beta1", "beta2"):
        check_interval(f"--{role}.{name}", getattr(optimizer, name), at_least=0.0, below=1.0)
    for name in ("min_lr_ratio", "warmup_ratio"):
        check_interval(f"--{role}.{name.replace('_', '-')}", getattr(optimizer, name), at_least=0.0, at_most=1.0)


def check_rollout(rollout: RolloutConfig) -> None:
    """Raise ConfigError for flags of servers that nothing would use, or that do not go together."""
    _check_rollout_pairs(rollout)
    default = RolloutConfig()
    started = {"rollout_servers", "rollout_tp", "rollout_memory_fraction", "rollout_python"}
    attached = {"rollout_urls", "rollout_router"}
    sync = {
        "rollout_sync",
        "rollout_bucket_mib",
        "rollout_master_address",
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
    if rollout.rollout_memory_fraction is not None:
        check_interval("--rollout-memory-fraction", rollout.rollout_memory_fraction, above=0.0, below=1.0)


def _check_timeouts(config: TrainsDiscriminator) -> None:
    """Ranks that wait for one that samples must not give up first: the error would then name a collective."""
    of_rollout, of_ranks = config.rollout.rollout_timeout_minutes, config.parallel.distributed_timeout_minutes
    if config.rollout.rollout == "sglang" and of_ranks <= of_rollout:
        raise ConfigError(
            f"--distributed-timeout-minutes {of_ranks} must be more than --rollout-timeout-minutes {of_rollout}, or "
            "ranks give up on one that is still sampling"
        )


def _check_sync(rollout: RolloutConfig, given: set[str]) -> None:
    """Raise ConfigError for ways to hand weights over that the servers, or the other flags, rule out."""
    sync = rollout.rollout_sync
    here = ("//127.", "//localhost", "//[::1]")
    distant = [url for url in rollout.rollout_urls if not any(mark in url for mark in here)]
    if sync == "tensor" and rollout.rollout_tp > 1:
        raise ConfigError(
            f"--rollout-sync tensor would send all weights {rollout.rollout_tp} times, once for every GPU of "
            "--rollout-tp; use --rollout-sync disk or group"
        )
    if sync == "group" and rollout.rollout_colocated:
        raise ConfigError("--rollout-sync group needs GPUs of the servers' own; leave --rollout-colocated out")
    if sync == "group" and distant and "rollout_master_address" not in given:
        raise ConfigError(
            f"--rollout-sync group: the workers of {distant[0]} cannot reach {rollout.rollout_master_address}; give an "
            "address of the first rank's host with --rollout-master-address"
        )
    if sync == "disk" and "rollout_bucket_mib" in given:
        raise ConfigError("--rollout-bucket-mib is for weights in pieces; leave it out with --rollout-sync disk")
    if sync != "group" and "rollout_master_address" in given:
        raise ConfigError("--rollout-master-address needs --rollout-sync group")
    if rollout.rollout_probe_every < 0:
        raise ConfigError(f"--rollout-probe-every {rollout.rollout_probe_every} must be at least 0, which turns it off")
    check_interval("--rollout-probe-bound", rollout.rollout_probe_bound, above=0.0)
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
    if recompute.recompute_modules and recompute.recompute != "selective":
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
    check_align_ranges(config)
    check_shared(config, shape, world_size=world_size, discriminator=discriminator)


def check_shared(
    config: TrainsDiscriminator, shape: Qwen3VLShape, *, world_size: int, discriminator: Qwen3VLShape | None
) -> None:
    """:func:`check_align` of what the stages have in common, ranges aside."""
    check_recompute(config.recompute)
    check_rollout(config.rollout)
    _check_timeouts(config)
    if shape.text.num_experts and discriminator is None:
        raise ConfigError(
            f"--model has {shape.text.num_experts} experts, and a discriminator is upcycled from a dense model only; "
            "make one of a dense Qwen3-VL with the same tokenizer by `python tools/convert.py to-megatron --as "
            "discriminator`, and name it with --discriminator"
        )
    routed = config.discriminator.routing != "dense"
    experts_per_tower = config.discriminator.experts_per_tower if routed else 0
    check_layout(config.parallel, shape, experts_per_tower=experts_per_tower, discriminator=discriminator)
    dtype = shape.dtype if config.model.dtype == "auto" else config.model.dtype
    check_precision(config.precision, config.parallel, shape, dtype=dtype)
    if discriminator is not None:
        try:
            check_precision(config.precision, config.parallel, discriminator, dtype=dtype)
        except ConfigError as error:
            raise ConfigError(f"--discriminator: {error}") from error
    if config.data.format_sft and config.data.data is None:
        raise ConfigError("--format-sft trains on records; name their folder with --data, or leave --format-sft out")
    data_parallel = check_world(config.parallel, world_size)
    prompts = config.rollout.prompts_per_step
    if prompts % data_parallel:
        near = [rounds * data_parallel for rounds in (prompts // data_parallel, prompts // data_parallel + 1)]
        raise ConfigError(
            f"--prompts-per-step {prompts} must be a multiple of the {data_parallel} data-parallel ranks; "
            f"use {listed(count for count in near if count)}"
        )
    _check_microbatches(config, data_parallel)


def _check_microbatches(config: TrainsDiscriminator, data_parallel: int) -> None:
    """Megatron's interleaved schedule takes whole rounds of pp micro-batches, of at least one answer each."""
    pp, vpp = config.parallel.pp, config.parallel.vpp
    if vpp == 1:
        return
    if config.data.format_sft:
        raise ConfigError(
            f"--vpp {vpp} needs a multiple of --pp {pp} micro-batches, and --format-sft has one; leave --format-sft "
            "out or use --vpp 1"
        )
    answers, wanted = config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt, data_parallel * pp
    if answers % wanted:
        raise ConfigError(
            f"--vpp {vpp} takes --pp {pp} micro-batches at a time on each of {data_parallel} data-parallel ranks, but "
            f"--prompts-per-step times --rollouts-per-prompt is {answers}; make it a multiple of {wanted}, or use "
            "--vpp 1"
        )


def check_interval(
    flag: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise ConfigError, naming ``flag``, for a value outside its bounds."""
    # Written so that a NaN fails every bound.
    bounds = (
        (at_least, at_least is None or value >= at_least, "at least"),
        (above, above is None or value > above, "above"),
        (at_most, at_most is None or value <= at_most, "at most"),
        (below, below is None or value < below, "below"),
    )
    if not all(holds for _, holds, _ in bounds):
        wanted = " and ".join(f"{word} {bound:g}" for bound, _, word in bounds if bound is not None)
        raise ConfigError(f"{flag} {value:g} must be {wanted}")


def _check_folder(flag: str, folder: object) -> None:
    if folder is not None and not Path(str(folder)).is_dir():
        raise ConfigError(f"{flag} {folder} is not a folder; give one that exists, or leave {flag} out")
