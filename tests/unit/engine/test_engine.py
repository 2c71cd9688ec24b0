"""What an engine counts, adds and forgets, on one rank (``tests/distributed`` has the layouts)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.gradients import gradient_of
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from tests.counting import Counting
from tests.distributed import tiny

WARM_UP = OptimizerConfig(lr=0.01, warmup_steps=4)


def gradients(engine: MegatronEngine) -> dict[str, Tensor]:
    return {name: gradient_of(p).clone() for name, p in engine.modules[0].named_parameters()}


def test_every_parameter_group_follows_the_schedule(world: World) -> None:
    """Claim: the first step has a quarter of the rate in a warm-up of four, in every group that Megatron makes."""
    engine = tiny.build(world, optimizer=WARM_UP)
    assert engine.optimizer is not None
    assert len(engine.optimizer.param_groups) > 1
    for step in range(3):
        engine.zero_grad()
        assert engine.step().lr == pytest.approx(0.01 * (step + 1) / 4)
        assert {group["lr"] for group in engine.optimizer.param_groups} == {WARM_UP.lr_at(step, 20)}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_skipped_step_counts_for_the_schedule_alone(world: World, broken: float) -> None:
    """Claim: one element that is not finite leaves every weight; the schedule goes on and Adam's count does not."""
    engine = tiny.build(world, optimizer=WARM_UP)
    before = tiny.exported(engine)
    engine.zero_grad()
    next(engine.modules[0].parameters()).main_grad.view(-1)[3] = broken
    result = engine.step()
    assert (result.updated, result.grad_norm) == (False, float("inf"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.exported(engine).items())
    assert engine.progress() == {"steps_taken": 1, "adam_step": 0}
    engine.zero_grad()
    assert engine.step().lr == pytest.approx(0.01 * 2 / 4)
    assert engine.progress() == {"steps_taken": 2, "adam_step": 1}


def test_a_pass_replaces_the_gradients_of_the_one_before(world: World) -> None:
    engine = tiny.build(world)
    batches, loss = tiny.batches_of(world, step=0)
    engine.forward_backward(batches, loss)
    once = gradients(engine)
    engine.forward_backward(batches, loss)
    for name, gradient in gradients(engine).items():
        torch.testing.assert_close(gradient, once[name], rtol=1e-5, atol=1e-7, msg=name)


def test_micro_batches_and_weights_are_counted(world: World) -> None:
    engine = tiny.build(world)
    engine.activity = activity = Counting()
    batches, loss = tiny.batches_of(world, step=0)
    engine.forward_backward(batches, loss)
    engine.forward(batches[:2], loss)
    passes = f"micro-batches of the {engine.name}"
    assert activity.counted == [(passes, len(batches), len(batches)), (passes, 2, 2)]
    weights = engine.export_hf()
    num_weights = len(weights.shapes)
    next(weights)
    assert f"of {num_weights} weights" in activity.text()
    assert len(list(weights)) == num_weights - 1
    assert activity.counted[2:] == [("weights", num_weights, num_weights)]


def test_sums_add_and_maxima_are_the_largest_of_all_micro_batches(world: World) -> None:
    """Claim: also where every value is negative and the largest comes neither first nor last."""
    engine = tiny.build(world, optimizer=None)
    batches, _ = tiny.batches_of(world, step=0)
    values = iter([-3.0, -1.0, -4.0, -2.0])

    def loss(output: VocabularyOutput, _batch: Batch) -> LossOutput:
        value = torch.tensor(next(values))
        return LossOutput(
            output.hidden_L_B_H.sum(), sums={"x": value}, maxima={"x": value}, rows={"x": value.expand(2)}
        )

    output = engine.forward(batches, loss)
    assert (output.sums, output.maxima) == ({"x": -10.0}, {"x": -1.0})
    assert [row["x"].tolist() for row in output.rows] == [[-3.0] * 2, [-1.0] * 2, [-4.0] * 2, [-2.0] * 2]


def test_bf16_gradients_add_up_in_fp32(world: World) -> None:
    """Claim: the gradient of a pass is the fp32 sum of its micro-batches' bf16 gradients, not rounded on the way."""
    engine = tiny.build(world, dtype=torch.bfloat16)
    batches, loss = tiny.batches_of(world, step=0)
    alone = []
    for batch in batches[:2]:
        engine.forward_backward([batch], loss)
        alone.append(gradients(engine))
    engine.forward_backward(batches[:2], loss)
    name = "decoder.final_layernorm.weight"
    together = gradients(engine)[name]
    assert torch.equal(together, alone[0][name] + alone[1][name])
    assert not torch.equal(together, together.bfloat16().float())
