"""A game whose every number can be worked out by hand: short token lists, a scorer of one weight, a bigram policy.

The players stand where engines do: they read real batches and run the real losses, backward included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.provider import LossFn, LossOutput, PassOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.engine.token_values import ValuesFn
from prism_megatron.training.batches import BatchFormat
from prism_megatron.types import ImageInput, Prompt, Response, Rollout, RolloutGroup, Segments, Span, VersionSpan

PAD, END, VOCAB = 0, 2, 32
DECAY = 0.5
"""what a step leaves of the weights, whatever the gradient"""
Score = Callable[[Sequence[int], int], float]


def image() -> ImageInput:
    return ImageInput(np.zeros((4, 3), dtype=np.float32), (1, 2, 2))


def response(caption: Sequence[int], reasoning: Sequence[int] = ()) -> Response:
    """A reference; without ``reasoning`` it is a caption alone."""
    middle, end = len(caption), len(caption) + len(reasoning)
    segments = Segments(Span(0, middle), Span(middle, end) if reasoning else None, None)
    return Response((*caption, *reasoning, END), segments)


def rollout(
    caption: Sequence[int],
    reasoning: Sequence[int],
    *,
    versions: Sequence[VersionSpan] = (),
    logprobs: Sequence[float] = (),
) -> Rollout:
    """A valid answer, drawn by version 0 with log-prob -1 a token unless told otherwise."""
    own = response(caption, reasoning)
    length = len(own.token_ids)
    return Rollout(
        own.token_ids,
        tuple(logprobs or [-1.0] * length),
        "stop",
        tuple(versions or [VersionSpan(0, 0, length)]),
        own.segments,
    )


def invalid(*token_ids: int) -> Rollout:
    """An answer that was cut, and has no segments."""
    length = len(token_ids)
    versions = (VersionSpan(0, 0, length),)
    return Rollout(token_ids, (-1.0,) * length, "length", versions, Segments(None, None, "cut"))


def group(
    reference: Response, *rollouts: Rollout, prompt: Sequence[int] = (5, 6, 7), images: Sequence[ImageInput] = ()
) -> RolloutGroup:
    return RolloutGroup(Prompt(str(prompt), tuple(prompt), tuple(images), "?"), reference, rollouts)


def form(
    length_multiple: int = 1, *, share_prompts: bool = False, unseen_token_ids: frozenset[int] = frozenset()
) -> BatchFormat:
    return BatchFormat(PAD, END, length_multiple, torch.device("cpu"), unseen_token_ids, share_prompts)


@contextmanager
def world_of_one() -> Iterator[World]:
    """A process group of this process alone, and what stages ask of a world."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    groups: Any = type("Groups", (), {"tp": dist.group.WORLD, "dp": dist.group.WORLD})
    try:
        yield World(
            0, 1, torch.device("cpu"), ParallelConfig(), groups, tp_rank=0, cp_rank=0, pp_rank=0, dp_rank=0, dp_size=1,
            layout={},
        )  # fmt: skip
    finally:
        dist.destroy_process_group()


def sequences_of(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens that each sequence's last token sees: its own, behind those of its prefix."""
    own = [
        tuple(batch.input_ids_B_S[row, start : start + length].tolist())
        for (row, start), length in zip(batch.places(), batch.lengths, strict=True)
    ]
    prefixes = batch.prefixes or (None,) * len(own)
    return [tokens if p is None else own[p] + tokens for tokens, p in zip(own, prefixes, strict=True)]


def score_of(tokens: Sequence[int], tower: int) -> float:
    """A number between -2 and 2 that depends on every token, its place and the tower."""
    return (sum((place + 1) * token for place, token in enumerate(tokens)) * (3 + tower) % 21 - 10) / 5


class Player(ABC):
    """What the stages use of an engine. ``passes`` are the batches it has seen; ``calls`` may be shared with others."""

    name = "player"

    def __init__(self, weight: Tensor, calls: list[str] | None = None) -> None:
        self.weight = weight.requires_grad_(True)
        self.passes: list[Sequence[Batch]] = []
        self.calls: list[str] = [] if calls is None else calls
        self.norms: list[float] = []
        """gradient norms to report for the next steps, in place of the true ones"""

    @abstractmethod
    def output(self, batch: Batch) -> Any:
        """What the model says of a batch: scores, or what logits are made of."""

    def forward_backward(
        self, batches: Sequence[Batch], loss: LossFn, *, adds: bool = False, more: bool = False
    ) -> PassOutput:
        del more
        self.calls.append(f"{self.name} learns")
        if not adds:
            self.weight.grad = None
        outputs = self._outputs(batches, loss)
        torch.stack([output.loss for output in outputs]).sum().backward()
        return _added(outputs)

    def forward(self, batches: Sequence[Batch], loss: LossFn, *, more: bool = False) -> PassOutput:
        del more
        self.calls.append(f"{self.name} looks")
        with torch.no_grad():
            return _added(self._outputs(batches, loss))

    def token_values(self, batches: Sequence[Batch], values: ValuesFn) -> list[list[Tensor]]:
        self.calls.append(f"{self.name} is asked")
        found = []
        with torch.no_grad():
            for batch in batches:
                of_batch = torch.nn.functional.pad(values(self.output(batch), batch), (1, 0))
                places = zip(batch.places(), batch.lengths, strict=True)
                found.append([of_batch[:, row, start : start + length] for (row, start), length in places])
        return found

    def step(self, *, update: bool = True) -> StepResult:
        self.calls.append(f"{self.name} steps")
        assert self.weight.grad is not None
        norm = self.norms.pop(0) if self.norms else float(self.weight.grad.norm())
        updated = update and bool(np.isfinite(norm))
        if updated:
            with torch.no_grad():
                self.weight.mul_(DECAY).sub_(self.weight.grad)
        return StepResult(norm, 0.1, updated)

    def _outputs(self, batches: Sequence[Batch], loss: LossFn) -> Sequence[LossOutput]:
        self.passes.append(batches)
        return [loss(self.output(batch), batch) for batch in batches]


class Scorer(Player):
    """A discriminator: ``weight * score_of(tokens)``; with dropout less of it, by the sequence's key.

    The score of a prompt that others go on from is 100, which nobody may read.
    """

    name = "discriminator"

    def __init__(self, weight: float = 1.0, *, dropout: float = 0.0, calls: list[str] | None = None) -> None:
        super().__init__(torch.tensor(weight, dtype=torch.float64), calls)
        self.dropout = dropout

    def output(self, batch: Batch) -> Tensor:
        assert batch.tower_ids_Q is not None
        towers = batch.tower_ids_Q.tolist()
        prompts = set(batch.prefixes) - {None}
        clean = [
            torch.tensor(100.0, dtype=torch.float64) if q in prompts else self.weight * score_of(tokens, towers[q])
            for q, tokens in enumerate(sequences_of(batch))
        ]
        keep = [1.0 - self.dropout * (key % 7) / 7 for key in batch.extras["dropout_key"].tolist()]
        return torch.stack(
            [torch.stack(clean), torch.stack([one * part for one, part in zip(clean, keep, strict=True)])]
        )


class Bigram(Player):
    """A policy whose logits depend on the last token only."""

    name = "policy"

    def __init__(self, calls: list[str] | None = None) -> None:
        super().__init__(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)), calls)

    def output(self, batch: Batch) -> VocabularyOutput:
        one_hot_S_B_V = torch.nn.functional.one_hot(batch.input_ids_B_S, VOCAB).transpose(0, 1).float()
        assert dist.group.WORLD is not None
        return VocabularyOutput(one_hot_S_B_V, self.weight.t(), dist.group.WORLD, VOCAB)

    def export_hf(self, bucket_bytes: int, *, layout: str, changed_only: bool) -> Iterator[tuple[str, Tensor]]:
        self.calls.append(f"policy exports {layout} by {bucket_bytes}{', what changed' * changed_only}")
        yield "weight", self.weight.detach().clone()


def _added(outputs: Sequence[LossOutput]) -> PassOutput:
    return PassOutput(
        sums={name: sum(float(output.sums[name]) for output in outputs) for name in outputs[0].sums},
        maxima={name: max(float(output.maxima[name]) for output in outputs) for name in outputs[0].maxima},
        rows=[output.rows for output in outputs],
    )
