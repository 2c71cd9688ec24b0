"""The discriminator of every kind in every layout against one process, and the walls between its towers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch

from model_providers.moe_discriminator.towers import Towers
from model_providers.moe_discriminator.upcycle import UpcycledSource
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.parity.tiny import tiny_config, tiny_model
from prism_megatron.testing import GlooWorld
from tests.parity.discriminator_oracle import (
    POOL,
    TOWERS,
    Case,
    PlainResult,
    StateSource,
    batch_of,
    game_case,
    in_folder_names,
    plain_discriminator,
    plain_hidden,
    plain_step,
    tiny_shape,
)
from tests.parity.discriminator_ranks import Options, RankStep, last_hidden_states, train_step, visits
from tests.parity.tiny_batches import real_tokens

LAYOUTS = {
    "TP1": (ParallelConfig(distributed_optimizer=False), 1),
    "TP2·SP·PP2": (ParallelConfig(tp=2, pp=2, distributed_optimizer=False), 4),
    "CP2·PP2": (ParallelConfig(cp=2, pp=2, distributed_optimizer=False), 4),
    "TP2·SP·CP2": (ParallelConfig(tp=2, cp=2, distributed_optimizer=False), 4),
    "EP2": (ParallelConfig(ep=2, distributed_optimizer=False), 2),
    "TP2·SP·EP2·DP2": (ParallelConfig(tp=2, ep=2, distributed_optimizer=False), 4),
}
DENSE_LAYOUTS = {
    "TP1": LAYOUTS["TP1"],
    "TP2·SP·PP2": (ParallelConfig(tp=2, pp=2, sp="on", distributed_optimizer=False), 4),
    "TP2·CP2": (ParallelConfig(tp=2, cp=2, distributed_optimizer=False), 4),
    "DP2": (ParallelConfig(distributed_optimizer=False), 2),
}
KINDS: dict[str, Towers | None] = {"segment": TOWERS, "learned": POOL, "dense": None}
RELATIVE = 1e-4
ALL_AT_ONCE = RecomputeConfig("full", recompute_vision=True)


class Oracle(NamedTuple):
    weights: StateSource
    result: PlainResult


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


@pytest.fixture(scope="module")
def case() -> Case:
    return game_case()


@pytest.fixture(scope="module")
def oracles(case: Case) -> dict[str, Oracle]:
    found = {}
    for kind, towers in KINDS.items():
        model = plain_discriminator(tiny_config(), towers)
        weights = in_folder_names({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
        found[kind] = Oracle(StateSource(weights), plain_step(model, case, towers))
    return found


@pytest.fixture(scope="module")
def weights(oracles: dict[str, Oracle]) -> StateSource:
    return oracles["segment"].weights


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, layout) for kind in ("segment", "learned") for layout in LAYOUTS),
        *(("dense", x) for x in DENSE_LAYOUTS),
    ],
)
def test_step_equals_transformers(
    gloo: GlooWorld, case: Case, oracles: dict[str, Oracle], kind: str, layout: str
) -> None:
    """Scores, pair loss, load-balancing and z-loss, expert loads, gradient norm and every gradient, within 1e-4.

    Once padded, once packed: then sequences of both towers lie in one row, cut by tensor- and context-parallel ranks
    where it falls. Micro-batches and data-parallel ranks hold unequal numbers of pairs; dropout is on; images are
    shared between sequences.
    """
    (parallel, num_ranks), oracle = (DENSE_LAYOUTS if kind == "dense" else LAYOUTS)[layout], oracles[kind]
    results = gloo.run(train_step, oracle.weights, case, Options(KINDS[kind]), parallel=parallel, num_ranks=num_ranks)
    for steps, packing in zip(zip(*results, strict=True), ("padded", "packed"), strict=True):
        check_step(steps, oracle.result, f"{kind} {layout} {packing}", parallel)


def test_without_coefficients_nothing_is_attached(gloo: GlooWorld, case: Case, oracles: dict[str, Oracle]) -> None:
    """As above, the oracle's load-balancing and z-loss at 0 and no weights in the batch.

    Routers' gradients are others then, by far more than the tolerance: the tests above see what is attached.
    """
    (weights, attached), (parallel, num_ranks) = oracles["segment"], LAYOUTS["TP2·SP·PP2"]
    options = Options(balance=0.0, z=0.0, packs=(True,))
    results = gloo.run(train_step, weights, case, options, parallel=parallel, num_ranks=num_ranks)
    expected = plain_step(plain_discriminator(tiny_config()), case, balance=0.0, z=0.0)
    check_step([step for (step,) in results], expected, "nothing attached", parallel)
    for name, gradient in expected.gradients.items():
        if name.endswith("mlp.gate.weight"):
            assert float((attached.gradients[name] - gradient).norm()) > 100 * RELATIVE * float(gradient.norm()), name


@pytest.mark.parametrize(("kind", "layout"), [("segment", "TP2·SP·CP2"), ("learned", "TP2·SP·EP2·DP2")])
def test_balance_by_microbatch(gloo: GlooWorld, case: Case, oracles: dict[str, Oracle], kind: str, layout: str) -> None:
    """As above with ``--load-balance-scope microbatch``, a prompt being a micro-batch; it is not that by sequence."""
    parallel, num_ranks = LAYOUTS[layout]
    options = Options(KINDS[kind], scope="microbatch", packs=(True,))
    results = gloo.run(train_step, oracles[kind].weights, case, options, parallel=parallel, num_ranks=num_ranks)
    expected = plain_step(plain_discriminator(tiny_config(), KINDS[kind]), case, KINDS[kind], scope="microbatch")
    check_step([step for (step,) in results], expected, f"{kind} {layout} by micro-batch", parallel)
    assert expected.balance != pytest.approx(oracles[kind].result.balance, rel=1e-3)


def check_step(results: Sequence[RankStep], oracle: PlainResult, name: str, parallel: ParallelConfig) -> None:
    by_prompt = {prompt: scores for result in results for prompt, scores in result.scores.items()}
    scores = torch.cat([by_prompt[prompt] for prompt in sorted(by_prompt)])
    oracle_norm = float(torch.stack([gradient.norm() for gradient in oracle.gradients.values()]).norm())
    torch.testing.assert_close(scores, oracle.scores, rtol=RELATIVE, atol=RELATIVE * float(oracle.scores.abs().max()))
    balance, z = (sum(result.attached[i] for result in results) for i in (0, 1))
    # The ranks that share sequences each have the whole of the first, and their own tokens' of the second.
    assert balance / (parallel.tp * parallel.cp) == pytest.approx(oracle.balance, rel=RELATIVE)
    assert z == pytest.approx(oracle.z, rel=RELATIVE)
    for result in results:
        assert result.loss == pytest.approx(oracle.loss, rel=RELATIVE)
        assert result.grad_norm == pytest.approx(oracle_norm, rel=RELATIVE)
        assert result.loads == pytest.approx(dict(oracle.loads), rel=RELATIVE)
        assert result.gradients.keys() == oracle.gradients.keys()
        for tensor, gradient in oracle.gradients.items():
            difference = float((result.gradients[tensor] - gradient).norm())
            assert difference <= RELATIVE * float(gradient.norm()), f"{tensor}: {difference} of {gradient.norm()}"
    worst = max(
        float((results[0].gradients[tensor] - gradient).norm() / gradient.norm())
        for tensor, gradient in oracle.gradients.items()
        if gradient.any()
    )
    print(
        f"{name:32} loss {results[0].loss:.6f} ({oracle.loss:.6f}) "
        f"balance {balance / (parallel.tp * parallel.cp):.6f} ({oracle.balance:.6f}) z {z:.6f} ({oracle.z:.6f}) "
        f"norm {results[0].grad_norm:.6f} ({oracle_norm:.6f}) "
        f"worst score {float((scores - oracle.scores).abs().max()):.1e}, worst gradient {worst:.1e} relative"
    )


@pytest.mark.parametrize(
    ("recompute", "layout", "freeze_vision"),
    [
        (ALL_AT_ONCE, ParallelConfig(tp=2, pp=2, distributed_optimizer=False), False),
        (ALL_AT_ONCE, ParallelConfig(tp=2, cp=2, ep=2, distributed_optimizer=False), True),
        (RecomputeConfig("selective", ("core_attn", "mlp")), ParallelConfig(pp=2, cp=2, ep=2), False),
        pytest.param(
            ALL_AT_ONCE,
            ParallelConfig(tp=2, pp=2, cp=2, ep=2, distributed_optimizer=False),
            True,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["TP2·PP2", "TP2·CP2·EP2, frozen vision", "PP2·CP2·EP2, selective", "TP2·PP2·CP2·EP2, frozen vision"],
)
def test_recompute_and_frozen_vision_with_everything_cut(
    *,
    gloo: GlooWorld,
    case: Case,
    oracles: dict[str, Oracle],
    recompute: RecomputeConfig,
    layout: ParallelConfig,
    freeze_vision: bool,
) -> None:
    """Packed; every gradient within 1e-4 of the oracle's, and that of a frozen vision tower exactly zero.

    The layers' attached losses and counted loads are recomputed too, and must not change.
    """
    num_ranks = layout.tp * layout.cp * layout.pp
    options = Options(packs=(True,), recompute=recompute, freeze_vision=freeze_vision)
    weights, oracle = oracles["segment"]
    with GlooWorld(num_ranks) if num_ranks > gloo.num_ranks else contextlib.nullcontext(gloo) as world:
        results = world.run(train_step, weights, case, options, parallel=layout, num_ranks=num_ranks)
    for (step,) in results:
        assert step.loads == pytest.approx(dict(oracle.loads), rel=RELATIVE)
        for name, gradient in oracle.gradients.items():
            frozen = freeze_vision and ".visual." in name
            expected = torch.zeros_like(gradient) if frozen else gradient
            assert float((step.gradients[name] - expected).norm()) <= RELATIVE * float(expected.norm()), name
        assert any(".visual." in name for name in step.gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upcycling_without_noise_is_the_dense_backbone(gloo: GlooWorld, case: Case, layout: str) -> None:
    """Identical experts and gates that sum to 1, whatever the router: hidden states equal to 1e-5 of their size."""
    parallel, num_ranks = LAYOUTS[layout]
    dense = tiny_model(tiny_config())
    tensors = StateSource({name: tensor.detach() for name, tensor in dense.state_dict().items()})
    sources = [
        (towers, UpcycledSource(tensors, tiny_shape(), towers, seed=3, expert_std=0.0, init_std=0.5))
        for towers in (TOWERS, POOL)
    ]
    results = gloo.run(last_hidden_states, sources, case, parallel=parallel, num_ranks=num_ranks)
    for of_kind in zip(*results, strict=True):
        by_prompt = {prompt: hidden for result in of_kind for prompt, hidden in result.items()}
        assert sorted(by_prompt) == [0, 1]
        for prompt, hidden_B_S_H in by_prompt.items():
            batch = batch_of(case, [prompt])
            with torch.no_grad():
                expected = plain_hidden(dense, batch)
            real = real_tokens(batch)
            ours = hidden_B_S_H[:, : real.shape[1]][real]
            torch.testing.assert_close(ours, expected[real], rtol=0, atol=1e-5 * float(expected[real].abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_reaches_the_other_tower(gloo: GlooWorld, case: Case, weights: StateSource, layout: str) -> None:
    """Counted where every layer's dispatcher hands over: all tokens go to the tower of their sequence, none elsewhere.

    For perception alone, reasoning alone, and both in one packed row. Experts of a tower that judges nothing get
    exactly zero gradient. Every expert-parallel rank holds, and is sent tokens of, its share of each tower.
    """
    parallel, num_ranks = LAYOUTS[layout]
    judged = [[0], [1], [0, 1]]
    results = gloo.run(visits, weights, case, judged, False, parallel=parallel, num_ranks=num_ranks)
    batch = batch_of(case, [0], multiple_of=parallel.length_multiple, pack=True)
    assert batch.tower_ids_Q is not None
    slots = [
        sum(slot for slot, tower in zip(batch.slots, batch.tower_ids_Q.tolist(), strict=True) if tower == t)
        for t in (0, 1)
    ]
    # Data-parallel ranks run the same batch here, and the ranks that share an expert are each sent all its tokens.
    copies = num_ranks // (parallel.tp * parallel.cp * parallel.pp) * parallel.expert_tp
    for number, towers in enumerate(judged):
        received = [sum(result[number].tokens[tower::2]) for result in results for tower in (0, 1)]
        for tower in (0, 1):
            expected = slots[tower] * TOWERS.top_k * tiny_shape().text.num_layers * copies if tower in towers else 0
            assert sum(received[tower::2]) == expected
            assert all((count > 0) == (tower in towers) for count in received[tower::2])
        for result in results:
            norms = {name: norm for name, norm in result[number].gradient_norms.items() if ".experts." in name}
            for name, norm in norms.items():
                assert norm == 0.0 or int(name.split(".experts.")[1].split(".")[0]) % 2 in towers, name
            assert any(norms.values())


def test_the_wall_is_what_keeps_tokens_apart(gloo: GlooWorld, case: Case, weights: StateSource) -> None:
    """With the segment mask ignored, tokens do reach the other tower: the counting above would notice."""
    ((result,),) = gloo.run(visits, weights, case, [[0]], True, num_ranks=1)
    assert sum(result.tokens[1::2]) > 0
    assert any(norm > 0.0 for name, norm in result.gradient_norms.items() if ".experts.1." in name)
