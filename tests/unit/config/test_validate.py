"""Values out of range, and flags that cannot go together, are refused in one line with what would do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from prism_megatron.commands.align import parse
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.tools.verify import VerifyConfig, check_verify
from prism_megatron.config.validate import check_align
from prism_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--tp", "0"], "--tp 0 must be at least 1"),
        (["--steps", "-1"], "--steps -1 must be at least 1"),
        (["--fp8-first-layers-bf16", "-1"], "--fp8-first-layers-bf16 -1 must be at least 0"),
        (["--top-p", "0"], "--top-p 0 must be above 0 and at most 1"),
        (["--temperature", "nan"], "--temperature nan must be above 0"),
        (["--alpha", "1.5"], "--alpha 1.5 must be at least 0 and at most 1"),
        (["--head-dropout", "1"], "--head-dropout 1 must be at least 0 and below 1"),
        (["--policy.lr", "-1"], "--policy.lr -1 must be at least 0"),
        (["--discriminator.lr", "nan"], "--discriminator.lr nan must be at least 0"),
        (["--discriminator.beta2", "1"], "--discriminator.beta2 1 must be at least 0 and below 1"),
        (["--top-k", "5"], "--top-k 5 must lie between 1 and --experts-per-tower 4"),
        (["--top-k", "0"], "--top-k 0 must lie between 1 and --experts-per-tower 4"),
        (["--experts-per-tower", "0"], "--experts-per-tower 0 must be at least 1"),
        (["--router-z-loss", "-1"], "--router-z-loss -1 must be at least 0"),
        (["--top-k", "4", "--load-balance", "0.1"], "--load-balance 0.1 has nothing to balance where every token goes"),
        (
            ["--routing", "learned", "--experts-per-tower", "2", "--load-balance", "0.1"],
            "--load-balance 0.1 has nothing to balance where every token goes to all 2 experts of its tower",
        ),
        (["--routing", "dense", "--load-balance", "0.1"], "--load-balance 0.1 is for routers, and --routing dense has"),
        (["--routing", "dense", "--router-z-loss", "0.1"], "--router-z-loss 0.1 is for routers, and --routing dense"),
        (["--routing", "dense", "--load-balance-scope", "microbatch"], "--load-balance-scope is for routers"),
        (["--routing", "dense", "--top-k", "1"], "--routing dense has no experts; leave --top-k 1 out"),
        (["--data", "no/such/folder"], "--data no/such/folder is not a folder"),
        (["--load", "no/such/folder"], "--load no/such/folder is not a folder"),
        (["--load", __file__], f"--load {__file__} is not a folder"),
    ],
)
def test_value_out_of_range_names_flag_and_range(argv: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert str(caught.value).startswith(complaint)


def test_all_experts_without_load_balancing_pass() -> None:
    """What is refused is the loss, not the towers."""
    assert parse(["--top-k", "4", "--router-z-loss", "0.001"]).discriminator.top_k == 4
    assert parse(["--top-k", "4", "--load-balance", "0"]).discriminator.top_k == 4


@pytest.mark.parametrize(
    ("config", "world_size", "complaint"),
    [
        (AlignConfig(parallel=ParallelConfig(ep=8)), 8, "--ep 8 must divide the 4 experts of a tower"),
        (
            AlignConfig(parallel=ParallelConfig(ep=2), discriminator=DiscriminatorConfig(routing="dense")),
            2,
            "--ep 2 needs a model with experts",
        ),
        (
            AlignConfig(data=DataConfig(data=Path(), format_sft=3)),
            3,
            "--format-sft takes --prompts-per-step 4 records a step, which must be a multiple of the 3",
        ),
        (
            AlignConfig(parallel=ParallelConfig(pp=2, vpp=2), data=DataConfig(data=Path(), format_sft=3)),
            4,
            "--vpp 2 needs a multiple of --pp 2 micro-batches, and --format-sft has one",
        ),
        (AlignConfig(data=DataConfig(format_sft=3)), 1, "--format-sft trains on records"),
        (AlignConfig(parallel=ParallelConfig(tp=2)), 3, "--tp 2 --pp 1 takes a multiple of 2 processes, not 3"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(
    config: AlignConfig, world_size: int, complaint: str, mini: Qwen3VLShape
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_align(config, mini, world_size=world_size)
    assert str(caught.value).startswith(complaint)


def with_experts(shape: Qwen3VLShape, count: int = 8, width: int = 40) -> Qwen3VLShape:
    text = dataclasses.replace(shape.text, num_experts=count, experts_per_token=2, expert_ffn=width)
    return dataclasses.replace(shape, text=text)


def test_a_policy_with_experts_needs_a_saved_discriminator(mini: Qwen3VLShape) -> None:
    policy = with_experts(mini)
    with pytest.raises(ConfigError) as caught:
        check_align(AlignConfig(), policy, world_size=1)
    assert str(caught.value) == (
        "--model has 8 experts, and a discriminator is upcycled from a dense model only; make one of a dense Qwen3-VL "
        "with the same tokenizer by `prism-convert to-megatron --as discriminator`, and name it with "
        "--discriminator"
    )
    check_align(AlignConfig(parallel=ParallelConfig(tp=2, ep=2)), policy, world_size=2, discriminator=mini)


@pytest.mark.parametrize(
    ("parallel", "count", "complaint"),
    [
        (ParallelConfig(ep=4), 6, "--ep 4 does not divide the 6 experts of a layer; use --ep 1, 2, 3 or 6"),
        (ParallelConfig(tp=8), 8, "--discriminator: --tp 8 does not divide the model (4 key/value heads, 8 attention"),
        (
            ParallelConfig(etp=5),
            8,
            "the discriminator: --etp 5 cuts every expert over 5 ranks, which does not divide its width of 156",
        ),
    ],
    ids=["policy's experts", "discriminator's heads", "discriminator's width"],
)
def test_a_layout_must_fit_both_players(
    parallel: ParallelConfig, count: int, complaint: str, mini: Qwen3VLShape
) -> None:
    """A policy of twice the mini's heads, whose experts are 40 wide, beside a discriminator of the mini's other sizes;
    each layout fits one of them."""
    policy = with_experts(mini, count)
    policy = dataclasses.replace(
        policy,
        text=dataclasses.replace(policy.text, heads=16, kv_heads=8),
        vision=dataclasses.replace(policy.vision, heads=8),
    )
    judge = dataclasses.replace(mini, text=dataclasses.replace(mini.text, ffn=156))
    with pytest.raises(ConfigError) as caught:
        check_align(AlignConfig(parallel=parallel), policy, world_size=8, discriminator=judge)
    assert str(caught.value).startswith(complaint)


def test_fp8_reads_the_folder_s_dtype_where_the_flag_leaves_it_open(mini: Qwen3VLShape) -> None:
    config = AlignConfig(model=ModelConfig(dtype="auto"), precision=PrecisionConfig(fp8="hybrid"))
    with pytest.raises(ConfigError, match="--fp8 hybrid works on bf16 parameters, not float32"):
        check_align(config, dataclasses.replace(mini, dtype="float32"), world_size=1)
    check_align(config, dataclasses.replace(mini, dtype="bfloat16"), world_size=1)


def test_fp8_must_fit_the_discriminator_too(mini: Qwen3VLShape) -> None:
    """It has fewer layers than the policy, none of which would be left in FP8."""
    deep = dataclasses.replace(mini, text=dataclasses.replace(mini.text, num_layers=8))
    config = AlignConfig(
        model=ModelConfig(dtype="bf16"), precision=PrecisionConfig(fp8="hybrid", fp8_first_layers_bf16=4)
    )
    with pytest.raises(ConfigError, match="--discriminator: --fp8-first-layers-bf16 4 leaves none of the 4 layers"):
        check_align(config, deep, world_size=1, discriminator=mini)
    check_align(config, deep, world_size=1, discriminator=deep)


def test_experts_of_the_policy_alone_may_be_spread(mini: Qwen3VLShape) -> None:
    """A dense discriminator lets --ep be what the policy takes."""
    config = AlignConfig(parallel=ParallelConfig(ep=8), discriminator=DiscriminatorConfig(routing="dense"),
                         rollout=RolloutConfig(prompts_per_step=8))  # fmt: skip
    check_align(config, with_experts(mini), world_size=8, discriminator=mini)


def test_a_comparison_of_ranks_that_do_not_wait_is_refused(mini: Qwen3VLShape) -> None:
    config = VerifyConfig(ParallelConfig(distributed_timeout_minutes=0))
    with pytest.raises(ConfigError, match="--distributed-timeout-minutes 0 must be at least 1"):
        check_verify(config, mini, world_size=1)


def test_modules_to_recompute_need_selective_recompute(mini: Qwen3VLShape) -> None:
    named = RecomputeConfig(recompute="full", recompute_modules=("mlp",))
    with pytest.raises(ConfigError, match="--recompute-modules mlp needs --recompute selective, not full"):
        check_align(AlignConfig(recompute=named), mini, world_size=1)


def test_usual_runs_pass(mini: Qwen3VLShape) -> None:
    check_align(AlignConfig(parallel=ParallelConfig(tp=4, pp=2)), mini, world_size=8)
    check_align(AlignConfig(parallel=ParallelConfig(pp=2, vpp=2)), mini, world_size=4)
    check_align(AlignConfig(parallel=ParallelConfig(tp=2, pp=2)), mini, world_size=8)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.5), (1, 1.0), (2, 1.0), (6, 0.55), (10, 0.1), (11, 0.1)],
)
def test_cosine_schedule_with_warm_up(step: int, expected: float) -> None:
    """Oracle: worked by hand for lr 1, two warm-up steps, ten steps in all, floor a tenth."""
    optimizer = OptimizerConfig(lr=1.0, schedule="cosine", warmup_steps=2, min_lr_ratio=0.1)
    assert optimizer.lr_at(step, 10) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--rollout sglang --rollout-embedded-ranks 1", "--rollout-embedded-ranks needs --rollout embedded"),
        ("--rollout-servers 2", "--rollout-servers needs --rollout sglang"),
        ("--rollout-urls http://a", "--rollout-urls needs --rollout sglang"),
        (
            "--rollout sglang --rollout-urls http://a --rollout-servers 2",
            "--rollout-servers starts servers, which --rollout-urls rules out",
        ),
        (
            "--rollout sglang --rollout-bucket-mib 8",
            "--rollout-bucket-mib is for weights in pieces; leave it out with --rollout-sync disk",
        ),
        ("--rollout sglang --rollout-servers 0", "--rollout-servers 0 must be at least 1"),
        ("--rollout-timeout-minutes 20", "--rollout-timeout-minutes needs --rollout sglang"),
        (
            "--rollout sglang --rollout-timeout-minutes 30",
            (
                "--distributed-timeout-minutes 30 must be more than --rollout-timeout-minutes 30, or ranks give up on "
                "one that is still sampling"
            ),
        ),
        ("--distributed-timeout-minutes 0", "--distributed-timeout-minutes 0 must be at least 1"),
        ("--rollout sglang --rollout-ahead -1", "--rollout-ahead -1 must be at least 0"),
        (
            "--rollout-ahead 2",
            (
                "--rollout-ahead 2 generates while a step trains, and with --rollout embedded the ranks that train are "
                "those that generate; use --rollout sglang, or leave it out"
            ),
        ),
        ("--rollout sglang --rollout-tp 0", "--rollout-tp 0 must be at least 1"),
        ("--rollout-tp 2", "--rollout-tp needs --rollout sglang"),
        ("--rollout-colocated", "--rollout-colocated needs --rollout sglang"),
        (
            "--rollout sglang --rollout-urls http://a --rollout-tp 2",
            "--rollout-tp starts servers, which --rollout-urls rules out",
        ),
        (
            "--rollout sglang --rollout-router http://a",
            "--rollout-router needs --rollout-urls, the servers that it is for",
        ),
        (
            "--rollout sglang --rollout-urls http://a --rollout-router http://b --rollout-colocated",
            "--rollout-router takes sleeping servers for dead; leave it or --rollout-colocated out",
        ),
        (
            "--rollout sglang --rollout-sync tensor --rollout-tp 2",
            (
                "--rollout-sync tensor would send all weights 2 times, once for every GPU of --rollout-tp; "
                "use --rollout-sync disk or group"
            ),
        ),
        (
            "--rollout sglang --rollout-colocated --rollout-ahead 1",
            (
                "--rollout-ahead 1 generates while a step trains, and with --rollout-colocated the servers have "
                "released their memory then; leave one of them out"
            ),
        ),
        (
            "--rollout sglang --rollout-sync group --rollout-colocated",
            "--rollout-sync group needs GPUs of the servers' own; leave --rollout-colocated out",
        ),
        (
            "--rollout sglang --rollout-spool-every 2",
            "--rollout-sync disk hands every version over in a folder; leave --rollout-spool-every out",
        ),
        ("--rollout-spool-every 2", "--rollout-spool-every needs --rollout sglang"),
        (
            "--rollout sglang --rollout-sync ipc --rollout-urls http://127.0.0.1:1 http://10.0.0.7:1",
            (
                "--rollout-sync ipc: http://10.0.0.7:1 is no server of this host, and handles of GPU memory do not "
                "leave it; use --rollout-sync disk or group"
            ),
        ),
        (
            "--rollout sglang --rollout-master-address 10.0.0.1",
            "--rollout-master-address needs --rollout-sync group",
        ),
        ("--rollout-probe-every 3", "--rollout-probe-every needs --rollout sglang"),
        (
            "--rollout sglang --rollout-probe-every -1",
            "--rollout-probe-every -1 must be at least 0, which turns it off",
        ),
        ("--rollout sglang --rollout-probe-bound 0", "--rollout-probe-bound 0 must be above 0"),
        (
            "--rollout sglang --rollout-probe-every 0 --rollout-probe-bound 0.5",
            "--rollout-probe-bound is for the probe, which --rollout-probe-every 0 turns off",
        ),
        (
            "--rollout sglang --rollout-memory-fraction 1.5",
            "--rollout-memory-fraction 1.5 must be above 0 and below 1",
        ),
    ],
)
def test_flags_of_servers_that_nothing_would_use(flags: str, complaint: str, mini: Qwen3VLShape) -> None:
    with pytest.raises(ConfigError) as error:
        check_align(parse(flags.split()), mini, world_size=1)
    assert str(error.value) == complaint


def test_servers_may_be_started_or_named(mini: Qwen3VLShape) -> None:
    for flags in ("", "--rollout sglang --rollout-servers 2", "--rollout sglang --rollout-urls http://a http://b"):
        check_align(parse(flags.split()), mini, world_size=1)


@pytest.mark.parametrize("check_images", ["headers", "off"])
def test_to_skip_what_is_bad_needs_all_images_looked_at(check_images: str, mini: Qwen3VLShape) -> None:
    data = DataConfig(on_bad="skip", check_images=check_images)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_align(AlignConfig(data=data), mini, world_size=1)
    assert str(caught.value) == (
        f"--on-bad skip leaves out what is bad before the first step, and --check-images {check_images} finds damaged "
        "images only at their step; use --check-images all, or --on-bad fail"
    )
    check_align(AlignConfig(data=DataConfig(on_bad="skip", check_images="all")), mini, world_size=1)


def test_there_may_be_more_ranks_than_prompts(mini: Qwen3VLShape) -> None:
    """Claim: four prompts on eight data-parallel ranks, or in interleaved rounds that they do not fill, are a run."""
    check_align(AlignConfig(), mini, world_size=8)
    uneven = RolloutConfig(rollouts_per_prompt=3)
    check_align(AlignConfig(parallel=ParallelConfig(pp=2, vpp=2), rollout=uneven), mini, world_size=8)
