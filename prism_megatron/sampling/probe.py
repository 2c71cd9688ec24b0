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
from prism_megatron.engine.batch import Batch, Extra, beside_logits, label_places
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.errors import WeightSyncError
from prism_megatron.training.batches import BatchFormat, supervised_batch
from prism_megatron.types import Prompt, TokenSequence


class Scorer(Protocol):
    """Servers that score a given answer."""

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
        are numbers of steps, of which not each one updates the policy.
        """
        self._example = next((one for one in examples if one.prompt.images), examples[0])
        self._every = every
        self._due: int | None = None
        self._bound = bound
        self._form = form
        self._world = world

    def check(self, servers: Scorer, policy: MegatronEngine, version: int) -> None:
        """Compare if it is ``version``'s turn; all ranks call it. Raises WeightSyncError for a server that differs."""
        if self._due is not None and version < self._due:
            return
        self._due = version + self._every
        prompt, response = self._example.prompt, self._example.reference.token_ids
        scores = servers.score(prompt, response)
        for url, (mean, largest) in zip(scores, self._gaps(policy, list(scores.values())), strict=True):
            if not mean <= self._bound:
                raise WeightSyncError(
                    f"{url} gives the probe {prompt.id!r} other log-probs than the trainer at version {version}: they "
                    f"differ by {mean:.3g} a token (largest {largest:.3g}), above --rollout-probe-bound "
                    f"{self._bound:g}; it does not run the trainer's policy"
                )

    def _gaps(self, policy: MegatronEngine, scores: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
        """Mean and largest absolute difference of each server's ``scores`` to the policy's."""
        prompt, response = self._example.prompt, self._example.reference.token_ids
        row = TokenSequence((*prompt.token_ids, *response), prompt.images)
        zeros = [0.0] * len(prompt.token_ids)
        batch = supervised_batch(
            [row] * len(scores),
            [zeros + [1.0] * len(response)] * len(scores),
            form=self._form,
            extras={Extra.SERVER_LOGPROBS: [[*zeros, *one] for one in scores]},
        )
        # Interleaved pipelines take whole rounds of micro-batches; ratios and maxima do not mind repetition.
        repeats = self._world.parallel.pp if self._world.parallel.vpp > 1 else 1
        found = policy.forward([batch] * repeats, partial(_probe_loss, world=self._world))
        numbers = range(len(scores))
        return [(found.sums[f"gap/{i}"] / found.sums[f"tokens/{i}"], found.maxima[f"gap/{i}"]) for i in numbers]


def _probe_loss(output: VocabularyOutput, batch: Batch, *, world: World) -> LossOutput:
    """Sums and maxima of each row's absolute differences."""
    mask_B_L = beside_logits(batch.extras[Extra.LABEL_MASK], batch, world)
    logprobs_B_L, _ = output.scores(beside_logits(batch.input_ids_B_S, batch, world), label_places(batch, world))
    gaps_B_L = (logprobs_B_L - beside_logits(batch.extras[Extra.SERVER_LOGPROBS], batch, world)).abs() * mask_B_L
    sums: dict[str, Tensor] = {}
    maxima: dict[str, Tensor] = {}
    for row, (gaps_L, mask_L) in enumerate(zip(gaps_B_L, mask_B_L, strict=True)):
        sums |= {f"gap/{row}": gaps_L.sum(), f"tokens/{row}": mask_L.sum()}
        maxima[f"gap/{row}"] = gaps_L.max()
    return LossOutput(loss=gaps_B_L.sum(), sums=sums, maxima=maxima)
