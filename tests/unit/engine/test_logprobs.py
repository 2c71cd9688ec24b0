"""Log-probs and entropies of one rank, in chunks that do not divide the tokens.

``tests/distributed/test_logprobs.py`` has vocabularies that are split over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prism_megatron.engine import logprobs
from prism_megatron.engine.logprobs import VocabularyOutput, places_of
from prism_megatron.engine.runtime import World

TOKENS, ROWS, WIDTH, VOCAB, PADDED = 7, 2, 5, 11, 16


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    mask: Tensor
    factors: Tensor
    """[2, B, L] of each log-prob and each entropy in the loss"""

    @classmethod
    def draw(cls) -> Case:
        generator = torch.Generator().manual_seed(7)
        hidden = torch.randn(TOKENS, ROWS, WIDTH, generator=generator)
        weight = 2 * torch.randn(PADDED, WIDTH, generator=generator)
        mask = torch.rand(ROWS, TOKENS, generator=generator) < 0.6
        return cls(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            torch.randint(VOCAB, (ROWS, TOKENS), generator=generator),
            mask,
            torch.randn(2, ROWS, TOKENS, generator=generator) * mask,
        )

    def output(self, world: World) -> VocabularyOutput:
        return VocabularyOutput(self.hidden, self.weight, world.groups.tp, VOCAB)

    def twin(self, temperature: float) -> tuple[Tensor, Tensor]:
        """By ``log_softmax`` in float64 over the real columns."""
        logits = self.hidden.double() @ self.weight.double().t()
        table = functional.log_softmax(logits[..., :VOCAB] / temperature, dim=-1).transpose(0, 1)
        return table.gather(-1, self.targets.unsqueeze(-1)).squeeze(-1), -(table.exp() * table).sum(-1)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def scored(case: Case, world: World, temperature: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    found = case.output(world).scores(case.targets, places_of(case.mask), temperature=temperature)
    return sum((f * one).sum() for f, one in zip(case.factors, found, strict=True)), found


def learnt(case: Case, world: World, temperature: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    def loss_of(logprobs_n: Tensor, entropy_n: Tensor, of: logprobs.Chosen) -> Tensor:
        return (of(case.factors[0]) * logprobs_n + of(case.factors[1]) * entropy_n).sum()

    return case.output(world).learn(loss_of, case.targets, places_of(case.mask), temperature=temperature)


@pytest.mark.parametrize("way", [scored, learnt])
@pytest.mark.parametrize(("chunk", "cached"), [(1, 1), (3, 2), (5, 100), (100, 2), (100, 100)])
def test_equals_log_softmax_in_float64(
    world: World, monkeypatch: pytest.MonkeyPatch, chunk: int, cached: int,
    way: Callable[[Case, World, float], tuple[Tensor, tuple[Tensor, Tensor]]],
) -> None:  # fmt: skip
    """Claim: values and gradients to 1e-5, however many of the labelled tokens go into a chunk, and however many of
    those a CPU passes over at a time; others have zeros.
    """
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk * PADDED)
    monkeypatch.setattr(logprobs, "_CACHED_ELEMENTS", cached * PADDED)
    case, temperature = Case.draw(), 0.6
    loss, found = way(case, world, temperature)
    expected = case.twin(temperature)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs * case.mask, rtol=0, atol=1e-5)
    twin = sum((f * one).sum() for f, one in zip(case.factors, expected, strict=True))
    assert isinstance(twin, Tensor)
    torch.testing.assert_close(loss.double(), twin, rtol=1e-5, atol=0)
    for mine, other in zip(case.gradients(3 * loss), case.gradients(3 * twin), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        assert mine.abs().max() > 0


@pytest.mark.parametrize("which", [0, 1], ids=["log-probs", "entropy"])
def test_a_loss_may_be_of_one_of_them(world: World, which: int) -> None:
    case = Case.draw()
    loss, _ = case.output(world).learn(lambda *args: args[which].sum(), case.targets, places_of(case.mask))
    twin = (case.twin(1.0)[which] * case.mask).sum()
    for mine, other in zip(case.gradients(loss), case.gradients(twin), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_sums_over_chunks_in_fp32(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the weight's gradient is rounded to bfloat16 once, and not once a chunk of one token of 600.

    2e-2: of products that were rounded to 2^-8 each; sums in bfloat16 would lose every token after some 256.
    """
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", PADDED)
    hidden = torch.ones(600, 1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(PADDED, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(1, 600, dtype=torch.int64)
    output = VocabularyOutput(hidden, weight, world.groups.tp, VOCAB)
    loss, _ = output.learn(lambda logprobs_n, *_: logprobs_n.sum(), targets, places_of(torch.ones(1, 600)))
    hidden_grad, weight_grad = torch.autograd.grad(loss, (hidden, weight))
    assert hidden_grad.dtype == weight_grad.dtype == torch.bfloat16
    expected = torch.full((VOCAB, WIDTH), -600 / VOCAB)
    expected[0] += 600
    torch.testing.assert_close(weight_grad[:VOCAB].float(), expected, rtol=2e-2, atol=0)


@dataclass
class Bf16Errors:
    """Largest error of a bf16 head against its float64 twin."""

    logprobs: float
    entropy: float
    hidden_grad: float
    weight_grad: float


def bf16_errors(world: World, *, fp32: bool, learns: bool) -> Bf16Errors:
    """Logits of up to 30, 900 columns; the twin has the same bf16 numbers, and its gradients are rounded once."""
    generator = torch.Generator().manual_seed(3)
    hidden = (4 * torch.randn(40, 2, 64, generator=generator)).bfloat16().requires_grad_()
    weight = (0.25 * torch.randn(900, 64, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(890, (2, 40), generator=generator)
    factors = torch.randn(2, 2, 40, generator=generator)
    output = VocabularyOutput(hidden, weight, world.groups.tp, 890, fp32)
    if learns:
        loss, found = output.learn(
            lambda logprobs_n, entropy_n, of: (of(factors[0]) * logprobs_n + of(factors[1]) * entropy_n).sum(),
            targets, places_of(torch.ones(2, 40)),
        )  # fmt: skip
    else:
        found = output.scores(targets, places_of(torch.ones(2, 40)))
        loss = (factors[0] * found.logprobs_B_L + factors[1] * found.entropy_B_L).sum()
    wide_hidden, wide_weight = (one.detach().double().requires_grad_() for one in (hidden, weight))
    table = functional.log_softmax((wide_hidden @ wide_weight.t())[..., :890], dim=-1).transpose(0, 1)
    twin = table.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(table.exp() * table).sum(-1)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad((factors[0] * twin[0] + factors[1] * twin[1]).sum(), (wide_hidden, wide_weight))

    def largest(ours: Tensor, theirs: Tensor) -> float:
        return float((ours.double() - theirs).abs().max() / theirs.abs().max())

    return Bf16Errors(*(float((ours.double() - theirs).abs().max()) for ours, theirs in zip(found, twin, strict=True)),
                      *map(largest, gradients, wanted))  # fmt: skip


@pytest.mark.parametrize("learns", [False, True])
def test_a_bf16_head_in_fp32_is_a_thousand_times_closer(
    world: World, monkeypatch: pytest.MonkeyPatch, *, learns: bool
) -> None:
    """Claim: 2e-5 nats with the flag, more than 0.02 without; gradients within the 2^-8 of their own last rounding.

    The weight is cast in six pieces, and tokens come in chunks.
    """
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 7 * 900)
    monkeypatch.setattr(logprobs, "_CAST_ELEMENTS", 150 * 64)
    plain, exact = (bf16_errors(world, fp32=fp32, learns=learns) for fp32 in (False, True))
    print(plain, exact)
    assert exact.logprobs < 2e-5 and exact.entropy < 2e-5
    assert plain.logprobs > 0.02 and plain.entropy > 0.002
    assert exact.hidden_grad < 2**-8 and exact.weight_grad < 2**-8
    assert exact.hidden_grad < plain.hidden_grad and exact.weight_grad < plain.weight_grad


def test_an_fp32_head_of_an_fp32_model_is_the_plain_one(world: World) -> None:
    case = Case.draw()
    output = VocabularyOutput(case.hidden, case.weight, world.groups.tp, VOCAB, fp32=True)
    assert torch.equal(output.scores(case.targets, places_of(case.mask))[0],
                       case.output(world).scores(case.targets, places_of(case.mask))[0])  # fmt: skip


def test_no_labels_are_a_loss_of_nothing_with_a_gradient(world: World) -> None:
    """A rank without labels runs the backward pass, and its collectives, as the others do."""
    case = Case.draw()
    case.mask[:] = False
    loss, scores = learnt(case, world, 1.0)
    assert loss.item() == 0.0 and not scores[0].any()
    assert not any(one.any() for one in case.gradients(loss))


def test_without_gradients_none_are_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.draw()
    with_them = learnt(case, world, 1.0)
    monkeypatch.setattr(logprobs._Gradients, "add", None)
    with torch.no_grad():
        loss, scores = learnt(case, world, 1.0)
    assert torch.equal(loss, with_them[0]) and torch.equal(scores[0], with_them[1][0])


def test_logits_are_the_plain_ones_with_padding_at_the_minimum(world: World) -> None:
    case = Case.draw()
    logits = case.output(world).logits()
    torch.testing.assert_close(logits[..., :VOCAB], case.hidden @ case.weight[:VOCAB].t())
    assert (logits[..., VOCAB:] == torch.finfo(torch.float32).min).all()


def test_without_entropies_loss_and_gradients_are_the_same_bits(world: World) -> None:
    """Claim: only the entropies are missing, and nobody can take them for numbers."""
    case, found = Case.draw(), []
    for with_entropy in (True, False):
        loss, scores = case.output(world).learn(
            lambda logprobs_n, _, of: (of(case.factors[0]) * logprobs_n).sum(),
            case.targets,
            places_of(case.mask),
            with_entropy=with_entropy,
        )
        found.append((loss.detach(), scores, case.gradients(loss)))
    (loss, scores, gradients), (other_loss, other_scores, other_gradients) = found
    assert torch.equal(loss, other_loss)
    assert torch.equal(scores.logprobs_B_L, other_scores.logprobs_B_L)
    assert all(torch.equal(one, other) for one, other in zip(gradients, other_gradients, strict=True))
    assert other_scores.entropy_B_L[case.mask].isnan().all()
    assert scores.entropy_B_L[case.mask].isfinite().all()
