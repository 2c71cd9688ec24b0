"""Shares of a step's samples: every pair once, in order, and no rank idle while there are pairs."""

from __future__ import annotations

from itertools import product

from prism_megatron.sampling.shares import sample_share


def test_shares_are_even_and_concatenate_to_all_pairs() -> None:
    for num_prompts, n, count in product(range(1, 5), range(1, 6), range(1, 9)):
        shares = [sample_share(num_prompts, n, index=index, count=count) for index in range(count)]
        pairs = [
            [(share.first + p, sample) for p, samples in enumerate(share.samples) for sample in samples]
            for share in shares
        ]
        assert [pair for part in pairs for pair in part] == list(product(range(num_prompts), range(n)))
        sizes = [len(part) for part in pairs]
        assert max(sizes) - min(sizes) <= 1
        assert all(samples for share in shares for samples in share.samples), "a prompt without samples is prefilled"
