"""Shares of a step's samples: every pair once, in order, and no rank idle while there are pairs."""

from __future__ import annotations

from concurrent.futures import Future
from itertools import product
from types import SimpleNamespace
from typing import Any

from prism_megatron.data.loader import Example
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.sampling.shares import Samplers, sample_share, share_to_draw
from prism_megatron.types import Prompt, Response, Segments


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


def test_ranks_without_an_engine_leave_no_gap() -> None:
    """Claim: where two of four ranks sample, these two draw everything between them, each with the keys of its part."""
    examples = [
        Example(Prompt(str(p), (5,), (), ""), Response((6,), Segments(None, None, "not judged"))) for p in range(3)
    ]
    asked: list[SampleRequest] = []
    engine: Any = SimpleNamespace(generate=asked.append)
    for rank in range(4):
        world: Any = SimpleNamespace(rank=rank)
        share_to_draw(engine, examples, Sampling(), Samplers([1, 3], 0), n=4, seed=8, step=9, world=world)()
    assert [[prompt.id for prompt in request.prompts] for request in asked] == [["0", "1"], ["1", "2"]]
    assert [request.wanted for request in asked] == [(range(4), range(2)), (range(2, 4), range(4))]
    assert [request.prompt_offset for request in asked] == [0, 1]
    assert {(request.n, request.seed, request.step) for request in asked} == {(4, 8, 9)}


def test_who_draws_an_answer_has_it_rewarded() -> None:
    """Claim: each prompt's answers go to the reward as soon as they are there, with their own example."""
    examples = [
        Example(Prompt(str(p), (5,), (), ""), Response((6,), Segments(None, None, "not judged"))) for p in range(3)
    ]
    seen: list[tuple[str, Any]] = []

    def reward(example: Example, rollouts: Any) -> Future[Any]:
        seen.append((example.prompt.id, rollouts))
        future: Future[Any] = Future()
        future.set_result([f"worth of {answer}" for answer in rollouts])
        return future

    def generate(request: SampleRequest) -> list[tuple[str, ...]]:
        drawn = [tuple(f"{prompt.id}.{i}" for i in some)
                 for prompt, some in zip(request.prompts, request.wanted, strict=True)]  # fmt: skip
        assert request.finished is not None
        for place in reversed(range(len(drawn))):  # servers finish in any order
            request.finished(place, drawn[place])  # type: ignore[arg-type]
        return drawn

    engine: Any = SimpleNamespace(generate=generate)
    world: Any = SimpleNamespace(rank=1)
    draw = share_to_draw(
        engine, examples, Sampling(), Samplers([0, 1], 0), n=2, seed=8, step=9, world=world, reward=reward
    )
    drawn: Any = draw()
    assert drawn.answers == [("1.1",), ("2.0", "2.1")]
    assert drawn.rewards == [["worth of 1.1"], ["worth of 2.0", "worth of 2.1"]]
    assert [name for name, _ in seen] == ["2", "1"]
