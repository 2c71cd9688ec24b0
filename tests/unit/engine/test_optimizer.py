"""Megatron's AdamW as it is configured here against torch's, on one rank (blind spots: NCCL, fused optimizers)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.optimizer import adam_step, inner_optimizers, set_adam_step
from prism_megatron.engine.runtime import World
from tests.distributed import tiny

UNUSUAL = OptimizerConfig(lr=0.05, beta1=0.6, beta2=0.7, eps=0.01, weight_decay=0.3, clip_grad=0.5)
"""No value is a default of ours, of torch or of Megatron, and each changes a step by far more than rounding."""


def parameters(engine: MegatronEngine) -> list[nn.Parameter]:
    return [parameter for module in engine.modules for parameter in module.parameters()]


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "replicated"])
def test_steps_are_those_of_torchs_adamw(world: World, distributed: bool) -> None:
    """Claim: three clipped steps move every weight, norms and biases included, as torch's AdamW does (1e-6 absolute).

    Gradients are of unlike sizes, so that the epsilon outweighs some second moments and not others.
    """
    parallel = ParallelConfig(distributed_optimizer=distributed)
    engine = tiny.build(dataclasses.replace(world, parallel=parallel), optimizer=UNUSUAL)
    ours = parameters(engine)
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    plain = torch.optim.AdamW(
        twins,
        lr=UNUSUAL.lr,
        betas=(UNUSUAL.beta1, UNUSUAL.beta2),
        eps=UNUSUAL.eps,
        weight_decay=UNUSUAL.weight_decay,
    )
    for _ in range(3):
        engine.zero_grad()
        for parameter, twin in zip(ours, twins, strict=True):
            twin.grad = torch.randn_like(twin) * 10.0 ** float(torch.randint(-2, 2, ()))
            parameter.main_grad.copy_(twin.grad)  # type: ignore[attr-defined]  # Megatron's gradient buffer
        norm = float(nn.utils.clip_grad_norm_(twins, UNUSUAL.clip_grad))
        assert engine.step().grad_norm == pytest.approx(norm, rel=1e-5)
        plain.step()
    for (name, parameter), twin in zip(engine.modules[0].named_parameters(), twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=0, atol=1e-6, msg=name)


def test_the_count_is_set_for_every_parameter(world: World) -> None:
    """Claim: whatever was counted before, every parameter's count is the one that is set, and steps go on from it."""
    engine = tiny.build(world)
    assert engine.optimizer is not None
    for start in (7, 3):
        set_adam_step(engine.optimizer, start)
        engine.zero_grad()
        engine.step()
        counts = [int(state["step"]) for inner in inner_optimizers(engine.optimizer) for state in inner.state.values()]
        assert len(counts) == len(parameters(engine))
        assert set(counts) == {adam_step(engine.optimizer)} == {start + 1}


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_tensors_are_updated_one_by_one(world: World, distributed: bool, dtype: torch.dtype) -> None:
    """Claim: no built AdamW is left to take all tensors at once, as torch does on CUDA, with copies of the shard.

    Blind spot: the memory of a real step on CUDA; the path alone is held.
    """
    parallel = ParallelConfig(distributed_optimizer=distributed)
    engine = tiny.build(dataclasses.replace(world, parallel=parallel), dtype=dtype)
    assert engine.optimizer is not None
    groups = [group for inner in inner_optimizers(engine.optimizer) for group in inner.param_groups]
    assert groups
    assert all(group["foreach"] is False and not group["fused"] for group in groups)
