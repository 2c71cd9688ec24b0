"""Every so many steps: do the servers and the trainer give the same answer the same log-probs?

What a step logs anyway compares what was sampled with what it is trained on; this asks about the newest weights, an
image's path included, before anything is sampled with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from prism_megatron.data.loader import Example
from prism_megatron.engine.batch import Batch, beside_logits, label_places
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.runtime import World
from prism_megatron.errors import WeightSyncError
from prism_megatron.training.batches import BatchFormat, supervised_batch
from prism_megatron.types import Prompt, TokenSequence


class Scorer(Protocol):
    """Servers that score a given answer."""

    @property
    def took_back(self) -> int:
        """How often a server was lost and given weights again; the same on every rank."""

    def score(self, prompt: Prompt, response: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """Log-probs of ``response`` at temperature 1 by each server's URL; the same on every rank."""


class ServingProbe:
    """One example of the data whose reference answer both sides score: the first that shows an image, or the first."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        every: int,
        bound: float,
        form: BatchFormat,
        world: World,
    ) -> None:
        """``bound`` is in nats, on the mean absolute difference a token.

        The first version is probed, and then the first that is ``every`` or more after the last probed one: versions
        are numbers of steps, of which not each one updates the policy. So is one after a server has come back.
        """
        self._example = next((one for one in examples if one.prompt.images), examples[0])
        self._every = every
        self._due: int | None = None
        self._took_back = 0
        self._bound = bound
        self._form = form
        self._world = world

    def check(self, servers: Scorer, policy: MegatronEngine, version: int) -> None:
        """Compare if it is ``version``'s turn; all ranks call it. Raises WeightSyncError for a server that differs."""
        is_due = self._due is None or version >= self._due or servers.took_back > self._took_back
        if not is_due:
            return
        self._took_back = servers.took_back
        self._due = version + self._every
        prompt, response = self._example.prompt, self._example.reference.token_ids
        scores = servers.score(prompt, response)
        logprobs = self._logprobs(policy)
        for url, theirs in scores.items():
            mean, largest = _gap(theirs, logprobs)
            if not mean <= self._bound:
                raise WeightSyncError(
                    f"{url} gives the probe {prompt.id!r} other log-probs than the trainer at version {version}: they "
                    f"differ by {mean:.3g} a token (largest {largest:.3g}), above --rollout-probe-bound "
                    f"{self._bound:g}; it does not run the trainer's policy"
                )

    def _logprobs(self, policy: MegatronEngine) -> list[float]:
        """The policy's own of the answer's tokens, on every rank: of one row, however many servers there are."""
        prompt, response = self._example.prompt, self._example.reference.token_ids
        row = TokenSequence((*prompt.token_ids, *response), prompt.images)
        mask = [0.0] * len(prompt.token_ids) + [1.0] * len(response)
        batch = supervised_batch([row], [mask], form=self._form)
        # Interleaved pipelines take whole rounds of micro-batches.
        repeats = self._world.parallel.pp if self._world.parallel.vpp > 1 else 1
        ((logprobs_1_T, *_), *_) = policy.token_values([batch] * repeats, partial(_scores, world=self._world))
        found: list[float] = logprobs_1_T[0, -len(response) :].tolist()
        return found


def _gap(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """Mean and largest absolute difference; NaN or infinity where a server's score is none."""
    gaps = [abs(one - other) for one, other in zip(theirs, ours, strict=True)]
    return sum(gaps) / len(gaps), max(gaps)


def _scores(output: VocabularyOutput, batch: Batch, *, world: World) -> Tensor:
    logprobs_B_L, _ = output.scores(beside_logits(batch.input_ids_B_S, batch, world), label_places(batch, world))
    return logprobs_B_L[None]
