"""Routers' losses of a policy: the same step in every layout, however it is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import RouterLosses
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld
from prism_megatron.training.batches import BatchFormat, supervised_batch
from prism_megatron.training.supervised_update import SFTUpdate, learn
from prism_megatron.types import TokenSequence
from tests.distributed import tiny

CONFIG: dict[str, Any] = {
    **tiny.CONFIG,
    "model_type": "qwen3_vl_moe",
    "text_config": {
        **tiny.CONFIG["text_config"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
LOSSES = RouterLosses(balance=3.0, z=0.5)
"""So large that they are most of the routers' gradient."""
LAYOUTS = {
    "DP2": (2, ParallelConfig()),
    "EP2": (2, ParallelConfig(ep=2)),
    "PP2": (2, ParallelConfig(pp=2)),
    "CP2": (2, ParallelConfig(cp=2)),
    "TP2-SP": (2, ParallelConfig(tp=2)),
    "TP2-SP-EP2": (2, ParallelConfig(tp=2, ep=2, etp=1)),
    "TP2-SP-CP2": (4, ParallelConfig(tp=2, cp=2)),
    "DP2-EP2-PP2": (4, ParallelConfig(ep=2, pp=2)),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def build(world: World, losses: RouterLosses, recompute: RecomputeConfig | None = None) -> MegatronEngine:
    execution = Execution(recompute=recompute or RecomputeConfig())
    provider = Qwen3VLProvider(Qwen3VLShape.from_dict(CONFIG), router_losses=losses, execution=execution)
    engine = MegatronEngine(
        name="policy",
        provider=provider,
        world=world,
        dtype=torch.float32,
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0, eps=1.0),
        total_steps=4,
    )
    engine.load_hf(tiny.weights(provider))
    return engine


Found = tuple[SFTUpdate, dict[str, Tensor]]


def step(world: World, losses: RouterLosses, rows_per_microbatch: int, fillers: int, full: bool) -> Found:
    """One step on eight rows of unequal length, and the whole gradients that it saw."""
    engine = build(world, losses, RecomputeConfig(recompute="full") if full else None)
    everything = tiny.rows(0)
    share = everything[world.dp_rank * 8 // world.dp_size : (world.dp_rank + 1) * 8 // world.dp_size]
    share += [(TokenSequence((tiny.PAD, tiny.PAD)), [0.0, 0.0])] * fillers
    form = BatchFormat(pad_token_id=tiny.PAD, end_token_id=1, length_multiple=world.parallel.length_multiple,
                       device=world.device)  # fmt: skip
    batches = [
        supervised_batch([row for row, _ in part], [mask for _, mask in part], form=form, pack=True)
        for part in (share[i : i + rows_per_microbatch] for i in range(0, len(share), rows_per_microbatch))
    ]
    found: dict[str, Tensor] = {}
    stepped = engine.step

    def seen(**how: Any) -> Any:
        found.update({name: gradient.clone() for name, gradient in engine.export_gradients()})
        return stepped(**how)

    engine.step = seen  # type: ignore[method-assign]
    update = learn(engine, batches, world=world)
    return update, found if world.is_main else {}


def assert_same(found: Found, wanted: Found) -> None:
    assert found[0].loss == pytest.approx(wanted[0].loss, rel=1e-5)
    assert found[0].result.grad_norm == pytest.approx(wanted[0].result.grad_norm, rel=1e-5)
    assert found[0].experts == pytest.approx(wanted[0].experts, rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm()) <= 2e-5 * float(gradient.norm()) + 1e-8, name


@pytest.fixture(scope="module")
def single(gloo: GlooWorld) -> Found:
    result: Sequence[Found] = gloo.run(step, LOSSES, 2, 0, False, num_ranks=1)
    return result[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_losses_and_gradients(gloo: GlooWorld, single: Found, layout: str) -> None:
    """Claim: loss, norm and figures to 1e-5 relative, every gradient to 2e-5 of its norm, those of routers too."""
    ranks, parallel = LAYOUTS[layout]
    assert_same(gloo.run(step, LOSSES, 2, 0, False, num_ranks=ranks, parallel=parallel)[0], single)


@pytest.mark.parametrize(
    ("rows", "fillers", "full"), [(1, 0, False), (8, 0, False), (2, 2, False), (4, 0, True)],
    ids=["one row each", "all in one", "with a filler", "recomputed"],
)  # fmt: skip
def test_cutting_the_step_otherwise_changes_nothing(
    *, gloo: GlooWorld, single: Found, rows: int, fillers: int, full: bool
) -> None:
    """Claim: micro-batches of another size, one that fills up, and recomputed layers give the same step."""
    (found,) = gloo.run(step, LOSSES, rows, fillers, full, num_ranks=1)
    assert_same(found, single)


def test_the_losses_are_what_routers_learn_from(gloo: GlooWorld, single: Found) -> None:
    """Claim: without coefficients there is no figure of a loss and another gradient; the answer's loss stays."""
    ((plain, gradients),) = gloo.run(step, RouterLosses(), 2, 0, False, num_ranks=1)
    assert plain.loss == pytest.approx(single[0].loss, rel=1e-6)
    assert set(plain.experts) == {"experts/peak_load", "experts/entropy", "experts/idle_share"}
    routers = [name for name in gradients if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    for name in routers:
        assert float((single[1][name] - gradients[name]).norm()) > 0.5 * float(gradients[name].norm())
