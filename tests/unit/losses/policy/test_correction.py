"""Importance weights against loops over floats, and what a correction does to an expected gradient."""

from __future__ import annotations

import math
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from prism_megatron.losses.policy.correction import Level, correction_weights, effective_share
from prism_megatron.losses.policy.kl import kl_estimate

DRAWS = 20_000


def slow_weights(
    old: list[float], rollout: list[float], level: str, *, masks: bool, low: float, high: float, veto: float
) -> list[float]:
    logs = [min(max(o - r, -20.0), 20.0) for o, r in zip(old, rollout, strict=True)]
    made = []
    whole = {"sequence": min(max(sum(logs), -20.0), 20.0), "geometric": sum(logs) / len(logs)}
    for log in logs:
        weight = math.exp(whole.get(level, log))
        if masks:
            made.append(weight if low <= weight <= high else 0.0)
        else:
            made.append(min(weight, high))
    return [0.0] * len(made) if any(math.exp(log) < veto for log in logs) else made


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("level", get_args(Level))
def test_weights_equal_a_loop_over_tokens(level: Level, masks: bool) -> None:
    """Claim: 200 answers of 1 to 12 tokens; some are vetoed, some weights are held or left out, and some are not."""
    generator = torch.Generator().manual_seed(3)
    vetoed = held = free = 0
    for number in range(200):
        n = 1 + number % 12
        old = -2.0 * torch.rand(n, generator=generator, dtype=torch.float64)
        rollout = old + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
        bounds = {"masks": masks, "low": 0.7, "high": 1.3, "veto": 0.4}
        made = correction_weights(old, rollout, level=level, **bounds)  # type: ignore[arg-type]  # they are as named
        expected = slow_weights(old.tolist(), rollout.tolist(), level, **bounds)  # type: ignore[arg-type]
        assert made.weights_T.tolist() == pytest.approx(expected, rel=1e-12)
        vetoed += made.vetoed
        held += made.truncated + (0 if made.vetoed else sum(weight == 0 for weight in expected))
        free += sum(0 < weight < 1.3 for weight in expected)
        if not masks and not made.vetoed:
            assert made.truncated == sum(weight == 1.3 for weight in expected)
    assert min(vetoed, held, free) >= 10


def test_kinds_by_hand() -> None:
    """Ratios of 2, 1 and 1/4: their product is 1/2 and their geometric mean its cube root."""
    old, rollout = torch.tensor([2.0, 1.0, 0.25]).log(), torch.zeros(3)

    def weights(
        level: Level, *, masks: bool = False, low: float = 0.5, high: float = 1.5, **veto: float
    ) -> list[float]:
        return correction_weights(
            old, rollout, level=level, masks=masks, low=low, high=high, veto=veto.get("veto")
        ).weights_T.tolist()

    assert weights("token") == pytest.approx([1.5, 1.0, 0.25])
    assert weights("token", masks=True) == pytest.approx([0.0, 1.0, 0.0])
    assert weights("sequence", low=0.4) == pytest.approx([0.5] * 3)
    assert weights("sequence", low=0.51, masks=True) == [0.0] * 3
    assert weights("geometric", masks=True) == pytest.approx([0.5 ** (1 / 3)] * 3)
    assert weights("token", veto=0.2) == pytest.approx([1.5, 1.0, 0.25])
    assert weights("token", veto=0.3) == [0.0] * 3


def test_an_answer_without_a_token_has_no_weight() -> None:
    for level in get_args(Level):
        made = correction_weights(torch.zeros(0), torch.zeros(0), level=level, masks=True, low=0.5, high=2.0, veto=0.1)
        assert made.weights_T.shape == (0,)
        assert not made.vetoed


def test_a_ratio_beyond_float_range_is_held() -> None:
    """One token a thousand nats apart, and a hundred of them: weights stay numbers."""
    for n, level in ((1, "token"), (100, "sequence")):
        old, rollout = torch.zeros(n), torch.full((n,), -1000.0)
        name: Level = level  # type: ignore[assignment]
        made = correction_weights(old, rollout, level=name, masks=False, low=0.0, high=1e30)
        assert made.weights_T.tolist() == pytest.approx([math.exp(20.0)] * n)


def test_the_effective_share_counts_what_is_kept() -> None:
    assert effective_share(torch.tensor([0.0, 2.0, 0.0, 2.0])) == 1.0
    assert effective_share(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 20)
    assert effective_share(torch.zeros(3)) is None


def perturbed(size: float) -> tuple[Tensor, Tensor]:
    """Logits of a bigram policy over five tokens, and those of an engine: ``size`` above or below by turns."""
    generator = torch.Generator().manual_seed(11)
    logits = 0.8 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    off = (-1.0) ** torch.arange(5)
    return logits, logits + size * torch.outer(off, off).double()


def reward(tokens: Tensor) -> Tensor:
    """Something that depends on all three tokens of an answer."""
    return torch.tensor([1.0, -0.5, 2.0, 0.0, -1.0], dtype=torch.float64)[tokens].sum(-1) + (tokens[..., 0] == 2) * 1.5


def answer_gradients(logits: Tensor, answers: Tensor) -> Tensor:
    """``reward * grad log pi(answer)`` by answer, as ``[answers, 25]``; the token before the first is 0."""
    before = torch.cat([torch.zeros_like(answers[:, :1]), answers[:, :-1]], dim=1)
    onehot = torch.nn.functional.one_hot(answers, 5).double() - logits.softmax(-1)[before]
    gradients = torch.zeros(len(answers), 5, 5, dtype=torch.float64)
    gradients.index_put_((torch.arange(len(answers))[:, None].expand_as(answers), before), onehot, accumulate=True)
    return gradients.flatten(1) * reward(answers).unsqueeze(1)


def logprobs_of(logits: Tensor, answers: Tensor) -> Tensor:
    before = torch.cat([torch.zeros_like(answers[:, :1]), answers[:, :-1]], dim=1)
    return logits.log_softmax(-1)[before, answers]


@pytest.mark.parametrize(("length", "level"), [(1, "token"), (3, "sequence")])
def test_a_correction_gives_the_on_policy_gradient(length: int, level: Level) -> None:
    """Claim: over 20,000 draws of a perturbed engine the corrected gradient is the on-policy one, within its error.

    The on-policy gradient is a sum over all answers, weighted by their probability. Of 25 components none is more than
    4 standard errors off with the correction, and their mean square is below 2.5; without it some are 10 and more.
    Answers of one token take token weights, of three tokens the sequence's, whose bound no draw reaches. Blind spot:
    token weights of longer answers, which leave a bias that grows with what tokens do to those that follow.
    """
    logits, engine = perturbed(0.25)
    every = torch.tensor(list(product(range(5), repeat=length)))
    probabilities = logprobs_of(logits, every).sum(-1).exp()
    expected = (probabilities.unsqueeze(1) * answer_gradients(logits, every)).sum(0)
    generator = torch.Generator().manual_seed(13)
    of_engine = logprobs_of(engine, every).sum(-1).exp()
    drawn = every[torch.multinomial(of_engine, DRAWS, replacement=True, generator=generator)]
    old, rollout = logprobs_of(logits, drawn), logprobs_of(engine, drawn)
    weights = torch.stack(
        [
            correction_weights(o, r, level=level, masks=False, low=0.0, high=10.0).weights_T[0]
            for o, r in zip(old, rollout, strict=True)
        ]
    )
    assert float(weights.max()) < 10.0
    off = {}
    for name, weight in (("corrected", weights), ("as drawn", torch.ones(DRAWS, dtype=torch.float64))):
        samples = answer_gradients(logits, drawn) * weight.unsqueeze(1)
        error = samples.std(0) / math.sqrt(DRAWS)
        moves = error > 1e-12  # tokens that cannot follow one another in so short an answer have no gradient
        off[name] = ((samples.mean(0) - expected)[moves] / error[moves]).abs()
    print(f"{length} tokens: corrected {off['corrected'].max():.2f} errors off at most, "
          f"as drawn {off['as drawn'].max():.2f}; effective share {effective_share(weights):.3f}")  # fmt: skip
    assert float(off["corrected"].max()) < 4.0
    assert float(off["corrected"].square().mean()) < 2.5
    assert float(off["as drawn"].max()) > 10.0


def test_estimators_of_a_divergence() -> None:
    """Claim: under the policy the means of k1 and k3 are KL(policy ‖ reference); gradients are as the docstring says.

    k2's expected gradient is the divergence's, k3's that of KL(reference ‖ policy), k1's nothing. Exact sums.
    """
    logits, other = perturbed(0.5)
    leaf = logits[0].clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), other[0].log_softmax(-1)
    p = log_p.detach().exp()
    kl = (log_p.exp() * (log_p - log_q)).sum()
    reverse = (log_q.exp() * (log_q - log_p)).sum()
    (of_kl,) = torch.autograd.grad(kl, leaf, retain_graph=True)
    (of_reverse,) = torch.autograd.grad(reverse, leaf, retain_graph=True)
    for estimator, value, gradient in (
        ("k1", kl, torch.zeros(5)), ("k2", None, of_kl), ("k3", kl, of_reverse)
    ):  # fmt: skip
        terms = kl_estimate(log_p, log_q, estimator=estimator)  # type: ignore[arg-type]  # one of the three
        if value is not None:
            assert float((p * terms).sum()) == pytest.approx(float(value))
        (found,) = torch.autograd.grad((p * terms).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(found, gradient.double(), rtol=1e-9, atol=1e-12)
