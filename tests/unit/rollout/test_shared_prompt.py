"""Attention over prompts that are held once, against SDPA over keys and values repeated for every row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_megatron.rollout.shared_prompt import SharedPrompts

LENGTHS = (7, 4, 5)
K, G, D = 2, 3, 8
TOLERANCE = 1e-5


def draw(*shape: int, scale: float = 3.0) -> Tensor:
    """Scores wide enough that a wrong maximum would show, in either part."""
    return torch.randn(*shape) * scale


class Repeated:
    """The slow twin: every row has its whole history, unpadded."""

    def __init__(self, keys_P: Tensor, values_P: Tensor, counts: tuple[int, ...]) -> None:
        owners = [p for p, count in enumerate(counts) for _ in range(count)]
        self.rows = [(keys_P[p, :, : LENGTHS[p]], values_P[p, :, : LENGTHS[p]]) for p in owners]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.rows = [
            (torch.cat((ks, key[r][:, None]), 1), torch.cat((vs, value[r][:, None]), 1))
            for r, (ks, vs) in enumerate(self.rows)
        ]
        return torch.stack(
            [
                F.scaled_dot_product_attention(query[r].view(K, G, D), ks, vs).flatten()
                for r, (ks, vs) in enumerate(self.rows)
            ]
        )


def check_steps(counts: tuple[int, ...], leaving: list[list[int]]) -> None:
    """After each step the rows named in ``leaving`` stay."""
    keys, values = draw(len(LENGTHS), K, max(LENGTHS), D), draw(len(LENGTHS), K, max(LENGTHS), D)
    padded = torch.arange(max(LENGTHS))[None] >= torch.tensor(LENGTHS)[:, None]
    shared = SharedPrompts([(keys, values)], counts, num_new=len(leaving), padded_P_S=padded)
    twin = Repeated(keys, values, counts)
    for kept in leaving:
        num_rows = len(twin.rows)
        query, key, value = draw(num_rows, K * G, D), draw(num_rows, K, D), draw(num_rows, K, D)
        expected = twin.attend(query, key, value)
        torch.testing.assert_close(shared.attend(0, query, key, value), expected, atol=TOLERANCE, rtol=TOLERANCE)
        shared.advance()
        shared.keep(torch.tensor(kept))
        twin.rows = [twin.rows[r] for r in kept]


def test_equal_numbers_of_rows() -> None:
    check_steps((2, 2, 2), [list(range(6)), list(range(6)), list(range(6))])


def test_rows_leave_and_prompts_with_them() -> None:
    """The second prompt loses its only row, then the first its last."""
    check_steps((3, 1, 2), [[0, 1, 2, 3, 4, 5], [0, 2, 4, 5], [2, 3], [0, 1]])


def test_a_new_key_may_outweigh_the_prompt_beyond_exp() -> None:
    """Differences of 200 overflow exp in float32 unless both parts share one maximum."""
    keys, values = draw(1, K, 4, D), draw(1, K, 4, D)
    query = torch.ones(1, K * G, D)
    for sign in (1.0, -1.0):
        shared = SharedPrompts([(keys, values)], (1,), num_new=1, padded_P_S=None)
        key, value = torch.full((1, K, D), sign * 200 / D**0.5), draw(1, K, D)
        expected = F.scaled_dot_product_attention(
            query.view(K, G, D), torch.cat((keys[0], key[0][:, None]), 1), torch.cat((values[0], value[0][:, None]), 1)
        )
        torch.testing.assert_close(shared.attend(0, query, key, value)[0], expected.flatten(), atol=1e-5, rtol=1e-5)
