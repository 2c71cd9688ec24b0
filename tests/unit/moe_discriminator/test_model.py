"""The scalar head, and what a discriminator asks of a batch (numbers: ``tests/parity/test_discriminator.py``)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from model_providers.moe_discriminator.model import Discriminator, ScoreHead, keyed_dropout
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.routing import TowerRouter, choose_experts, mask_other_towers
from prism_megatron.config.stages.discriminator import LoadBalanceScope
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.types import TokenSequence
from tests.distributed import checkpoint_ranks, tiny
from tests.parity.discriminator_ranks import attached_losses

KEYS = np.array([11, 2**62 + 1, 5])


def head_of(dropout: float, dtype: torch.dtype = torch.float32) -> ScoreHead:
    config = SimpleNamespace(hidden_size=64, params_dtype=dtype, use_cpu_initialization=True)
    head = ScoreHead(config, dropout)
    torch.nn.init.normal_(head.weight)
    return head


def test_the_head_scores_without_dropout_and_with_it() -> None:
    """Claim: the first scores, from which rewards are read, have none; both are float32 products, for a bf16 weight
    too, and equal where the rate is 0."""
    hidden = torch.randn(3, 64)
    head = head_of(0.3, torch.bfloat16)
    weight = head.weight[0].double()
    clean, dropped = head(hidden, KEYS)
    torch.testing.assert_close(clean.double(), hidden.double() @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        dropped.double(), keyed_dropout(hidden, KEYS, 0.3).double() @ weight, rtol=1e-5, atol=1e-5
    )
    assert float((clean - dropped).detach().abs().min()) > 0.01
    torch.testing.assert_close(*head_of(0.0)(hidden, None))


def test_a_gradient_needs_dropout_keys() -> None:
    """Claim: without keys only a pass without gradients is scored, and it is scored without dropout."""
    head, hidden = head_of(0.3), torch.randn(3, 64)
    with pytest.raises(ValueError, match=r"dropout of 0.3 needs .*dropout_key"):
        head(hidden, None)
    with torch.no_grad():
        torch.testing.assert_close(*head(hidden, None))


def discriminator(world: World, *, router_z_loss: float) -> Discriminator:
    shape = tiny.provider().shape
    provider = DiscriminatorProvider(shape, checkpoint_ranks.TOWERS, router_z_loss=router_z_loss)
    engine = MegatronEngine(
        name="discriminator", provider=provider, world=world, dtype=torch.float32, optimizer=None, total_steps=1
    )
    (module,) = engine.modules
    assert isinstance(module, Discriminator)
    return module


def batch_of(*, prefixes: tuple[int | None, ...] = (), **weights: float) -> Batch:
    """A sequence of three tokens and one of five, which may go on from it; the same weight for both."""
    return collate(
        [TokenSequence((5, 6, 7)), TokenSequence((5, 6, 7, 8, 9))],
        pad_token_id=tiny.PAD,
        multiple_of=4,
        device=torch.device("cpu"),
        pack=True,
        prefixes=prefixes,
        tower_ids=[1, 0],
        sequence_extras={name: [weight] * 2 for name, weight in weights.items()},
    )


def router_arguments(module: Discriminator, batch: Batch) -> tuple[Tensor, ...]:
    return module.mlp_args(batch, module.local_tokens(batch))


def test_scores_are_read_at_the_last_real_token(world: World) -> None:
    """Claim: padding behind a sequence, and sequences behind it, have no part in its score."""
    engine = checkpoint_ranks.build(world, "discriminator")
    (module,) = engine.modules
    assert isinstance(module, Discriminator)
    seen: list[Tensor] = []
    module.decoder.register_forward_hook(lambda _module, _inputs, hidden: seen.append(hidden))
    output = engine.forward([batch_of()], lambda scores, _batch: LossOutput(scores.sum(), rows={"scores": scores[0]}))
    expected = seen[0][[2, 4 + 4], 0] @ module.score_head.weight[0]
    torch.testing.assert_close(output.rows[0]["scores"], expected)


def test_a_prefix_counts_in_what_goes_on_from_it(world: World) -> None:
    """Claim: of a sequence of five behind a prompt of three the router's losses are means over eight tokens.

    Without a gradient there are none.
    """
    module, prefixes = discriminator(world, router_z_loss=0.1), (None, 0)
    batch = batch_of(prefixes=prefixes, load_balance_weight=0.25, sequence_share=0.5)
    *_, members, lengths, weights, z_weights = router_arguments(module, batch)
    assert {tuple(pair) for pair in members.T.tolist()} == {(0, 1), (1, 1)}
    assert (lengths.tolist(), weights.tolist()) == ([0, 8], [0.25, 0.25])
    expected = [0.1 * 0.5 / 8] * 3 + [0.0] + [0.1 * 0.5 / 8] * 5 + [0.0] * 3
    assert z_weights.flatten().tolist() == pytest.approx(expected)
    with torch.no_grad():
        assert len(router_arguments(module, batch)) == 3


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
def test_a_shared_prompt_changes_no_loss_of_a_router(world: World, scope: LoadBalanceScope) -> None:
    """Claim: losses of every layer, and the gradient of the routers, equal those of whole sequences.

    Two sequences of one tower and one of the other, the first two behind one prompt. fp32, to 1e-5 of the largest:
    sums in another order.
    """
    prompt, ends = (5, 6, 7), ((8, 9), (10, 11, 12, 13), (14,))
    weights = [0.5, 0.25, 1.0]
    whole = collate(
        [TokenSequence((*prompt, *end)) for end in ends], pad_token_id=tiny.PAD, multiple_of=4,
        device=torch.device("cpu"), pack=True, tower_ids=[0, 0, 1],
        sequence_extras={"load_balance_weight": weights, "sequence_share": weights},
    )  # fmt: skip
    shared = collate(
        [TokenSequence(one) for one in (prompt, ends[0], ends[1], prompt, ends[2])], pad_token_id=tiny.PAD,
        multiple_of=4, device=torch.device("cpu"), pack=True, prefixes=(None, 0, 0, None, 3),
        tower_ids=[0, 0, 0, 1, 1],
        sequence_extras={
            name: [0.0, 0.5, 0.25, 0.0, 1.0] for name in ("load_balance_weight", "sequence_share")
        },
    )  # fmt: skip
    engine = checkpoint_ranks.build(world, "discriminator")
    (module,) = engine.modules
    assert isinstance(module, Discriminator)
    module.load_balance_scope, module.router_z_loss = scope, 0.1
    found = []
    for batch in (whole, shared):
        with attached_losses() as (balance, z):
            engine.forward_backward([batch], lambda scores, _batch: LossOutput(0.0 * scores.sum()))
        gates = {name: of for name, of in engine.export_gradients() if "gate" in name}
        found.append((balance, z, {name: gradient.clone() for name, gradient in gates.items()}))
    (balance, z, gradients), shares = found
    assert shares[0] == pytest.approx(balance, rel=1e-5)
    assert shares[1] == pytest.approx(z, rel=1e-5)
    assert balance and min(balance) > 0.0 and min(z) > 0.0
    assert any(gradient.any() for name, gradient in gradients.items() if name.endswith("gate.weight"))
    for name, gradient in gradients.items():
        torch.testing.assert_close(shares[2][name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


def test_a_z_loss_needs_the_share_of_each_sequence(world: World) -> None:
    """Claim: without it a gradient is refused; with it every real token weighs coefficient · share / length."""
    module = discriminator(world, router_z_loss=0.1)
    with pytest.raises(ValueError, match=r"z-loss of 0.1 needs .*sequence_share"):
        router_arguments(module, batch_of(load_balance_weight=0.5))
    *_, balance_K, z_weights = router_arguments(module, batch_of(sequence_share=0.5))
    assert balance_K.tolist() == [0.0, 0.0]
    expected = [0.1 * 0.5 / 3] * 3 + [0.0] + [0.1 * 0.5 / 5] * 5 + [0.0] * 3
    assert z_weights.flatten().tolist() == pytest.approx(expected)


def test_a_bf16_router_computes_in_float32(world: World) -> None:
    """Claim: gates are the float32 products' of the bf16 weights and hidden states, to 1e-6."""
    engine = checkpoint_ranks.build(world, "discriminator", dtype=torch.bfloat16)
    router = next(part for part in engine.modules[0].modules() if isinstance(part, TowerRouter))
    hidden, towers = torch.randn(16, 1, 64).bfloat16(), torch.arange(16)[:, None] % 2
    gates, chosen = router(hidden, towers, torch.zeros(16, 1, dtype=torch.int64), torch.tensor([16]))
    logits = hidden[:, 0].double() @ router.weight.double().T
    expected = choose_experts(mask_other_towers(logits, towers[:, 0], 2), checkpoint_ranks.TOWERS.top_k)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.double(), expected[0], rtol=0, atol=1e-6)
    assert torch.equal(chosen, expected[1])
