"""The discriminator in every layout against plain torch in one process, and the walls between its towers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from model_providers.moe_discriminator.upcycle import UpcycledSource
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.config.recompute import RecomputeConfig
from prism_megatron.parity.tiny import tiny_config, tiny_model
from prism_megatron.testing import GlooWorld
from tests.parity.discriminator_oracle import (
    TOWERS,
    Case,
    PlainResult,
    StateSource,
    batch_of,
    game_case,
    plain_discriminator,
    plain_hidden,
    plain_step,
    tiny_shape,
)
from tests.parity.discriminator_ranks import Options, RankStep, last_hidden_states, train_step, visits_of_rows
from tests.parity.tiny_batches import real_tokens

LAYOUTS = {
    "TP1": (ParallelConfig(distributed_optimizer=False), 1),
    "TP2·SP·PP2": (ParallelConfig(tp=2, pp=2, distributed_optimizer=False), 4),
    "CP2·PP2": (ParallelConfig(cp=2, pp=2, distributed_optimizer=False), 4),
    "TP2·SP·CP2": (ParallelConfig(tp=2, cp=2, distributed_optimizer=False), 4),
    "EP2": (ParallelConfig(ep=2, distributed_optimizer=False), 2),
    "TP2·SP·EP2·DP2": (ParallelConfig(tp=2, ep=2, distributed_optimizer=False), 4),
}
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


@pytest.fixture(scope="module")
def case() -> Case:
    return game_case()


@pytest.fixture(scope="module")
def weights() -> StateSource:
    model = plain_discriminator(tiny_config())
    return StateSource({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


@pytest.fixture(scope="module")
def oracle(case: Case) -> PlainResult:
    return plain_step(plain_discriminator(tiny_config()), case)


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_equals_plain_torch(
    *, gloo: GlooWorld, case: Case, weights: StateSource, oracle: PlainResult, layout: str, pack: bool
) -> None:
    """Scores, pair loss, gradient norm and every gradient of one step, load balancing included, within 1e-4.

    Micro-batches and data-parallel ranks hold unequal numbers of pairs; dropout is on; images are shared between
    sequences; packed ones of both towers lie in one row, cut by tensor- and context-parallel ranks where it falls.
    """
    parallel, num_ranks = LAYOUTS[layout]
    results = gloo.run(train_step, weights, case, Options(pack=pack), parallel=parallel, num_ranks=num_ranks)
    check_step(results, oracle, f"{layout} {'packed' if pack else 'padded'}")


def test_without_weights_no_load_is_balanced(gloo: GlooWorld, case: Case, weights: StateSource) -> None:
    """As above, the oracle's balance at 0 and no weights in the batch."""
    parallel, num_ranks = LAYOUTS["TP2·SP·PP2"]
    results = gloo.run(train_step, weights, case, Options(balance=0.0), parallel=parallel, num_ranks=num_ranks)
    check_step(results, plain_step(plain_discriminator(tiny_config()), case, balance=0.0), "without balance")


def check_step(results: Sequence[RankStep], oracle: PlainResult, name: str) -> None:
    by_prompt = {prompt: scores for result in results for prompt, scores in result.scores.items()}
    scores = torch.cat([by_prompt[prompt] for prompt in sorted(by_prompt)])
    oracle_norm = float(torch.stack([gradient.norm() for gradient in oracle.gradients.values()]).norm())
    torch.testing.assert_close(scores, oracle.scores, rtol=RELATIVE, atol=RELATIVE * float(oracle.scores.abs().max()))
    for result in results:
        assert result.loss == pytest.approx(oracle.loss, rel=RELATIVE)
        assert result.grad_norm == pytest.approx(oracle_norm, rel=RELATIVE)
        assert result.gradients.keys() == oracle.gradients.keys()
        for tensor, gradient in oracle.gradients.items():
            difference = float((result.gradients[tensor] - gradient).norm())
            assert difference <= RELATIVE * float(gradient.norm()), f"{tensor}: {difference} of {gradient.norm()}"
    worst = max(
        float((results[0].gradients[tensor] - gradient).norm() / gradient.norm())
        for tensor, gradient in oracle.gradients.items()
    )
    print(
        f"{name:24} loss {results[0].loss:.6f} ({oracle.loss:.6f}) "
        f"norm {results[0].grad_norm:.6f} ({oracle_norm:.6f}) "
        f"worst score {float((scores - oracle.scores).abs().max()):.1e}, worst gradient {worst:.1e} relative"
    )


@pytest.mark.parametrize(
    "recompute",
    [RecomputeConfig("full", recompute_vision=True), RecomputeConfig("selective", ("core_attn", "mlp"))],
    ids=["full and vision", "selective"],
)
def test_recompute_changes_no_gradient(
    gloo: GlooWorld, case: Case, weights: StateSource, recompute: RecomputeConfig
) -> None:
    """Claim: to 1e-5 of each gradient's norm, load balancing included, whose loss is attached inside the layer."""
    parallel, num_ranks = LAYOUTS["TP2·SP·PP2"]
    (plain, *_), (again, *_) = (
        gloo.run(train_step, weights, case, Options(recompute=chosen), parallel=parallel, num_ranks=num_ranks)
        for chosen in (RecomputeConfig(), recompute)
    )
    for name, gradient in plain.gradients.items():
        assert float(gradient.norm()) > 0.0, name
        assert float((again.gradients[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upcycling_without_noise_is_the_dense_backbone(gloo: GlooWorld, case: Case, layout: str) -> None:
    """Identical experts and gates that sum to 1, whatever the router: hidden states equal to 1e-5 of their size."""
    parallel, num_ranks = LAYOUTS[layout]
    dense = tiny_model(tiny_config())
    source = UpcycledSource(
        StateSource({name: tensor.detach() for name, tensor in dense.state_dict().items()}),
        tiny_shape(),
        TOWERS,
        seed=3,
        expert_std=0.0,
        init_std=0.5,
    )
    by_prompt = {
        prompt: hidden
        for result in gloo.run(last_hidden_states, source, case, parallel=parallel, num_ranks=num_ranks)
        for prompt, hidden in result.items()
    }
    assert sorted(by_prompt) == [0, 1]
    for prompt, hidden_B_S_H in by_prompt.items():
        batch = batch_of(case, [prompt])
        with torch.no_grad():
            expected = plain_hidden(dense, batch)
        real = real_tokens(batch)
        ours = hidden_B_S_H[:, : real.shape[1]][real]
        torch.testing.assert_close(ours, expected[real], rtol=0, atol=1e-5 * float(expected[real].abs().max()))


def rows_of_tower(case: Case, tower: int) -> list[int]:
    return [row for row, judged in enumerate(case.tower_ids[0]) if judged == tower]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tower", [0, 1])
def test_no_token_reaches_the_other_tower(
    gloo: GlooWorld, case: Case, weights: StateSource, layout: str, tower: int
) -> None:
    """Counted where every layer's dispatcher hands over: all tokens go to the row's tower, none to the other.

    The other tower's expert weights get exactly zero gradient.
    """
    parallel, num_ranks = LAYOUTS[layout]
    rows = rows_of_tower(case, tower)
    results = gloo.run(visits_of_rows, weights, case, rows, False, parallel=parallel, num_ranks=num_ranks)
    for result in results:
        assert sum(result.tokens[1 - tower :: 2]) == 0
        assert sum(result.tokens[tower::2]) > 0
        for name, norm in result.gradient_norms.items():
            if ".experts." in name:
                expert = int(name.split(".experts.")[1].split(".")[0])
                assert (norm > 0.0) <= (expert % 2 == tower), name
        touched = [name for name, norm in result.gradient_norms.items() if ".experts." in name and norm > 0.0]
        assert touched


def test_the_wall_is_what_keeps_tokens_apart(gloo: GlooWorld, case: Case, weights: StateSource) -> None:
    """With the segment mask ignored, tokens do reach the other tower: the counting above would notice."""
    (result,) = gloo.run(visits_of_rows, weights, case, rows_of_tower(case, 0), True, num_ranks=1)
    assert sum(result.tokens[1::2]) > 0
    assert any(norm > 0.0 for name, norm in result.gradient_norms.items() if ".experts.1." in name)
