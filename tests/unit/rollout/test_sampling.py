"""Draws follow the stated distribution, keyed and nothing else.

Frequencies of 20,000 draws with fixed keys are held against theory by chi-square at 0.1 % significance. Blind spot: a
bias below about one part in fifty of a token's probability passes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prism_megatron.errors import ConfigError
from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.sampling import choose_tokens, keyed_uniforms

CPU = torch.device("cpu")
NONE = torch.empty(0, dtype=torch.long)
NUM_DRAWS = 20_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.2, -3.0, 0.9, -0.4])
# 0.1 % quantile of chi-square by degrees of freedom (Abramowitz and Stegun, table 26.8).
CHI_SQUARE_999 = {2: 13.816, 3: 16.266, 4: 18.467, 5: 20.515, 6: 22.458, 7: 24.322}


def draws(sampling: Sampling, never: torch.Tensor = NONE) -> np.ndarray:
    """Counts by token over the positions of one sample; every log-prob must be the temperature's."""
    uniforms = keyed_uniforms(seed=3, step=0, rows=[(0, 0)], num_positions=NUM_DRAWS, device=CPU)[0]
    tokens, logprobs = choose_tokens(LOGITS.expand(NUM_DRAWS, -1), uniforms, sampling, never)
    theory = torch.from_numpy(softmax(sampling.temperature)).log()[tokens]
    torch.testing.assert_close(logprobs.double(), theory, atol=1e-6, rtol=0.0)
    return np.bincount(tokens.numpy(), minlength=len(LOGITS))


def assert_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * NUM_DRAWS
    chi_square = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert chi_square < CHI_SQUARE_999[int(possible.sum()) - 1], chi_square


def softmax(temperature: float) -> np.ndarray:
    return torch.softmax(LOGITS.double() / temperature, -1).numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_follow_the_temperature(temperature: float) -> None:
    assert_frequencies(draws(Sampling(temperature=temperature)), softmax(temperature))


def test_frequencies_hold_over_prompts_and_samples() -> None:
    """One draw of each of 100 x 200 (prompt, sample) pairs, as rows of a step draw them."""
    rows = [(prompt, sample) for prompt in range(100) for sample in range(NUM_DRAWS // 100)]
    uniforms = keyed_uniforms(seed=3, step=0, rows=rows, num_positions=1, device=CPU)[:, 0]
    tokens, _ = choose_tokens(LOGITS.expand(NUM_DRAWS, -1), uniforms, Sampling(), NONE)
    assert_frequencies(np.bincount(tokens.numpy(), minlength=len(LOGITS)), softmax(1.0))


def test_the_check_sees_a_temperature_that_is_ignored() -> None:
    """The frequencies of temperature 1 are no sample of temperature 0.9."""
    with pytest.raises(AssertionError):
        assert_frequencies(draws(Sampling(temperature=1.0)), softmax(0.9))


@pytest.mark.parametrize(("top_p", "temperature", "size"), [(0.7, 1.0, 3), (0.9, 1.0, 5), (0.9, 2.0, 6)])
def test_frequencies_follow_the_nucleus(top_p: float, temperature: float, size: int) -> None:
    """The nucleus is that of the distribution at the temperature."""
    probabilities = softmax(temperature)
    order = np.argsort(-probabilities)
    assert probabilities[order[: size - 1]].sum() < top_p <= probabilities[order[:size]].sum()
    probabilities[order[size:]] = 0.0
    assert_frequencies(draws(Sampling(temperature, top_p)), probabilities / probabilities.sum())


def test_a_nucleus_that_is_reached_exactly_has_no_token_more() -> None:
    """Probabilities of powers of two, which add up without rounding: 0.5 + 0.25 reach 0.75."""
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log().repeat(2, 1)
    uniforms = torch.tensor([0.66, 0.999], dtype=torch.float64)
    tokens, _ = choose_tokens(logits, uniforms, Sampling(top_p=0.75), NONE)
    assert tokens.tolist() == [1, 3]


def test_a_nucleus_is_of_what_forbidden_tokens_leave() -> None:
    """Half of the mass is forbidden: a quarter is half of the rest, and one token reaches a top-p of 0.5."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    tokens, _ = choose_tokens(
        logits, torch.tensor([0.999], dtype=torch.float64), Sampling(top_p=0.5), torch.tensor([0])
    )
    assert tokens.tolist() == [1]


def test_forbidden_tokens_leave_the_distribution_but_not_the_logprobs() -> None:
    probabilities = softmax(1.0)
    probabilities[0] = 0.0
    assert_frequencies(draws(Sampling(), torch.tensor([0])), probabilities / probabilities.sum())
    tokens, logprobs = choose_tokens(
        LOGITS[None], torch.tensor([0.5], dtype=torch.float64), Sampling(), torch.tensor([0])
    )
    assert logprobs.item() == pytest.approx(float(LOGITS.log_softmax(-1)[tokens]), abs=1e-6)


def test_logprobs_are_those_of_the_whole_softmax_at_the_temperature() -> None:
    uniforms = torch.tensor([0.3], dtype=torch.float64)
    for sampling, scale in ((Sampling(temperature=0.5, top_p=0.4), 0.5), (Sampling(temperature=0.0), 1.0)):
        tokens, logprobs = choose_tokens(LOGITS[None], uniforms, sampling, NONE)
        assert tokens.item() == 0
        assert logprobs.item() == pytest.approx(float((LOGITS / scale).log_softmax(-1)[0]), abs=1e-6)


def test_the_edges_of_the_unit_interval_give_possible_tokens() -> None:
    """u = 0 must skip leading tokens of probability 0; the largest u must not run past the vocabulary."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    tokens, _ = choose_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), Sampling(), NONE)
    assert tokens[0].item() == 1
    assert tokens[1].item() == 2


def test_every_uniform_has_its_own_coordinates() -> None:
    """No two of (seed, step, prompt, sample, position) share a number; a longer row starts with the shorter one."""

    def table(seed: int, step: int, rows: list[tuple[int, int]], length: int = 8) -> np.ndarray:
        return keyed_uniforms(seed=seed, step=step, rows=rows, num_positions=length, device=CPU).numpy()

    base = table(1, 2, [(0, 0), (0, 1), (1, 0), (1, 1)])
    others = [table(2, 1, [(0, 0)]), table(1, 3, [(0, 0)]), table(-1, 2, [(0, 0)])]
    numbers = np.concatenate([base.ravel(), *[other.ravel() for other in others]])
    assert len(np.unique(numbers)) == numbers.size
    np.testing.assert_array_equal(table(1, 2, [(1, 0)], length=50)[0, :8], base[2])


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}])
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong)  # type: ignore[arg-type]
