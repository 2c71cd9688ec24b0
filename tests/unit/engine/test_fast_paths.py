"""Which faster ways a run takes follows from flags, machine and layout; what cannot be had is refused by name.

Machines are made up.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.tensor_parallel import layers

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.speed import SpeedConfig, check_speed, check_speed_of_experts
from prism_megatron.engine.host.capabilities import Installed
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.host.fast_paths import PLAIN_PATHS, FastPaths, Setting, fast_paths
from prism_megatron.engine.layers import torch_linears
from prism_megatron.errors import ConfigError
from tests.distributed import checkpoint_ranks, tiny

CPU = Installed("2.13.0")
GPU = Installed("2.13.0", (9, 0))
HOPPER = Installed("2.13.0", (9, 0), transformer_engine="2.20.2", deep_ep=True)
TORCH = Setting("torch", ParallelConfig(), ranks=2, dtype="bf16")
TE = Setting("te", ParallelConfig(ep=2), ranks=2, dtype="bf16")


def table(machine: Installed, setting: Setting, speed: SpeedConfig | None = None) -> dict[str, tuple[str, str]]:
    _, rows = fast_paths(machine, speed or SpeedConfig(), setting)
    return {row.part: (row.uses, row.why) for row in rows}


def test_a_gpu_with_transformer_engine_takes_all_that_is_exact() -> None:
    """Claim: by default, on Transformer Engine's layers; the choice of experts and DeepEP are not taken unasked."""
    paths, _ = fast_paths(HOPPER, SpeedConfig(), TE)
    assert paths == FastPaths(
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        fuse_weight_gradients=True,
        fuse_swiglu=True,
        fuse_permutation=True,
    )
    uses = {part: uses for part, (uses, _) in table(HOPPER, TE).items()}
    assert uses == {
        "gradient sums": "during backward",
        "weight gathers": "during forward",
        "weight gradients": "summed in the product",
        "experts' SwiGLU and gates": "one kernel, compiled by torch",
        "order of experts' tokens": "Transformer Engine 2.20.2, fused",
        "choice of experts": "torch",
        "carriage of experts' tokens": "all-to-all",
        "CUDA graphs": "off",
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_cpu_sums_in_the_product_alone_and_the_table_says_why(dtype: str) -> None:
    paths, _ = fast_paths(CPU, SpeedConfig(), dataclasses.replace(TORCH, dtype=dtype))
    assert paths == FastPaths(fuse_weight_gradients=True)
    why = {part: why for part, (_, why) in table(CPU, TORCH).items()}
    assert why["gradient sums"] == "--overlap-grad-reduce auto: no CUDA device that could compute meanwhile"
    assert why["weight gathers"] == "--overlap-param-gather auto: gradient sums do not overlap"
    assert why["weight gradients"] == "--fuse-weight-gradients auto"
    assert "compiling for a CPU" in why["experts' SwiGLU and gates"]
    assert why["order of experts' tokens"] == "--fuse-permutation auto: layers are not Transformer Engine's"


def test_what_helps_nobody_is_left() -> None:
    """Claim: one rank has nothing to sum or gather, and without a distributed optimizer nothing is gathered."""
    alone, _ = fast_paths(GPU, SpeedConfig(), dataclasses.replace(TORCH, ranks=1))
    assert not alone.overlap_grad_reduce and not alone.overlap_param_gather
    whole, _ = fast_paths(
        GPU, SpeedConfig(), dataclasses.replace(TORCH, parallel=ParallelConfig(distributed_optimizer=False))
    )
    assert whole.overlap_grad_reduce and not whole.overlap_param_gather


def test_apex_is_what_layers_of_torch_need_for_weight_gradients() -> None:
    bare, _ = fast_paths(GPU, SpeedConfig(), TORCH)
    able, _ = fast_paths(dataclasses.replace(GPU, fused_weight_gradients=True), SpeedConfig(), TORCH)
    assert not bare.fuse_weight_gradients and able.fuse_weight_gradients


def test_off_is_off_and_on_is_on_where_it_gains_nothing() -> None:
    speed = SpeedConfig("off", "off", None, "off", "off", "off")
    assert fast_paths(HOPPER, speed, TE)[0] == PLAIN_PATHS
    wanted = SpeedConfig("on", "on", bucket_parameters=7, fuse_swiglu="on")
    assert fast_paths(CPU, wanted, TORCH)[0] == FastPaths(True, True, 7, fuse_weight_gradients=True, fuse_swiglu=True)


@pytest.mark.parametrize(
    ("machine", "setting", "speed", "complaint"),
    [
        (GPU, TORCH, SpeedConfig(fuse_weight_gradients="on"), r"apex's extension .* is missing; leave it out"),
        (GPU, TORCH, SpeedConfig(fuse_permutation="on"), "--fuse-permutation .* layers are not Transformer Engine's"),
        (GPU, TORCH, SpeedConfig(fuse_router=True), "--fuse-router .* layers are not Transformer Engine's"),
        (
            dataclasses.replace(HOPPER, transformer_engine="2.6.1"), TE, SpeedConfig(fuse_router=True),
            r"needs Transformer Engine 2\.7 and 2\.6\.1 is here",
        ),
        (
            dataclasses.replace(CPU, compiler="there is no compiler"), TORCH, SpeedConfig(fuse_swiglu="on"),
            "--fuse-swiglu cannot be had here: there is no compiler",
        ),
        (CPU, TORCH, SpeedConfig(overlap_param_gather="on"), "gradient sums do not overlap"),
        (CPU, TE, SpeedConfig(moe_dispatcher="deepep"), "no CUDA device and the package deep_ep is missing"),
        (HOPPER, TORCH, SpeedConfig(moe_dispatcher="deepep"), "no token leaves its rank"),
        (
            HOPPER, dataclasses.replace(TE, dtype="fp32"), SpeedConfig(moe_dispatcher="deepep"),
            "take bf16, and the model is in fp32",
        ),
        (
            HOPPER, dataclasses.replace(TE, parallel=ParallelConfig(ep=2, deterministic=True)),
            SpeedConfig(moe_dispatcher="deepep"), "--deterministic",
        ),
    ],
)  # fmt: skip
def test_what_is_asked_for_and_cannot_be_had_is_refused(
    machine: Installed, setting: Setting, speed: SpeedConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        fast_paths(machine, speed, setting)


@pytest.mark.parametrize(
    ("speed", "complaint"),
    [
        (SpeedConfig(overlap_param_gather="on"), "--overlap-param-gather on gathers by the buckets"),
        (SpeedConfig("on", "on"), "--distributed-optimizer"),
        (SpeedConfig("off", bucket_parameters=5), "--bucket-parameters is for --overlap-grad-reduce, which is off"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_ranks_start(speed: SpeedConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_speed(speed, distributed_optimizer=False)
    check_speed(SpeedConfig(), distributed_optimizer=False)


def test_settings_are_ones_that_megatron_takes() -> None:
    """Claim: each way reaches Megatron's config under its name; a dense model is told of none that experts have."""
    fast = FastPaths(fuse_swiglu=True, fuse_router=True, dispatcher="deepep")
    experts = Qwen3VLShape.from_dict(checkpoint_ranks.EXPERTS_CONFIG)
    config = Qwen3VLProvider(experts, execution=Execution(fast=fast)).transformer_config(
        ParallelConfig(ep=2), torch.bfloat16
    )
    assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", "deepep")
    assert config.bias_activation_fusion and config.moe_router_fusion and not config.moe_permute_fusion
    dense = Qwen3VLProvider(tiny.provider().shape, execution=Execution(fast=fast)).transformer_config(
        ParallelConfig(), torch.bfloat16
    )
    assert dense.moe_token_dispatcher_type == "alltoall" and not dense.bias_activation_fusion


@pytest.mark.parametrize("apex", [False, True])
def test_linears_of_torch_fuse_weight_gradients_with_apex_alone(apex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: beside Transformer Engine's layers, which need no apex, those of the vision tower stay as they are."""
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", apex)
    config = Qwen3VLProvider(
        tiny.provider().shape, execution=Execution(fast=FastPaths(fuse_weight_gradients=True))
    ).transformer_config(ParallelConfig(), torch.float32)
    assert torch_linears.torch_linears(config).gradient_accumulation_fusion == apex
    assert config.gradient_accumulation_fusion


@pytest.mark.parametrize(
    ("speed", "flag"),
    [
        (SpeedConfig(fuse_swiglu="on"), "--fuse-swiglu on"),
        (SpeedConfig(fuse_permutation="on"), "--fuse-permutation on"),
        (SpeedConfig(fuse_router=True), "--fuse-router"),
        (SpeedConfig(moe_dispatcher="deepep"), "--moe-dispatcher deepep"),
    ],
)
def test_flags_of_experts_are_refused_where_there_are_none(speed: SpeedConfig, flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} is for models with experts"):
        check_speed_of_experts(speed, [])
    check_speed_of_experts(speed, [ParallelConfig(ep=2), ParallelConfig(tp=2)])


def test_deepep_is_refused_where_a_model_has_its_experts_whole() -> None:
    """Claim: of the discriminator too, whose split may be its own."""
    deep = SpeedConfig(moe_dispatcher="deepep")
    with pytest.raises(ConfigError, match="carries tokens between ranks"):
        check_speed_of_experts(deep, [ParallelConfig(ep=8), ParallelConfig()])
