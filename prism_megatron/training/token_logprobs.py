"""Log-probs and entropies of all tokens of an experience under a policy, and what a correction makes of them.

Shape suffixes: B rows, L tokens of this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.config.stages.objective import CorrectionConfig
from prism_megatron.engine.batch import Batch, beside_logits, label_places
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.runtime import World
from prism_megatron.losses.policy.correction import CorrectedRow, Level, correction_weights, effective_share
from prism_megatron.training.batches import PlannedBatch
from prism_megatron.training.experience import Experience, ExperienceRow


@dataclass(frozen=True)
class TokenScores:
    """One rollout's tokens: log-probability of each in nats, and entropy of the distribution that it was drawn from."""

    logprobs: list[float]
    entropies: list[float]


def token_scores(
    policy: MegatronEngine, planned: Sequence[PlannedBatch], rows: Sequence[ExperienceRow], *, temperature: float,
    world: World,
) -> list[TokenScores]:  # fmt: skip
    """Those of ``rows``, in their order and on every rank; ``planned`` are this data-parallel rank's micro-batches.

    Every rank calls this. Data-parallel ranks bring together what each has found in one sum.
    """
    lengths = [len(row.rollout.token_ids) for row in rows]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    flat_2_T = torch.zeros(2, starts[-1], device=world.device)
    found = policy.token_values([one.batch for one in planned], partial(_scores, temperature=temperature, world=world))
    for one, values_of in zip(planned, found, strict=True):
        for row, values_2_T in zip(one.rows, values_of, strict=True):
            if row is None:
                continue  # a prompt that answers share
            flat_2_T[:, starts[row] : starts[row + 1]] = values_2_T[:, -lengths[row] :] if lengths[row] else 0.0
    if world.dp_size > 1:
        dist.all_reduce(flat_2_T, group=world.groups.dp)  # each value is another rank's 0
    logprobs, entropies = flat_2_T.tolist()
    return [
        TokenScores(logprobs[start : start + length], entropies[start : start + length])
        for start, length in zip(starts, lengths, strict=False)
    ]


def _scores(output: VocabularyOutput, batch: Batch, *, temperature: float, world: World) -> Tensor:
    targets_B_L = beside_logits(batch.input_ids_B_S, batch, world)
    return torch.stack(output.scores(targets_B_L, label_places(batch, world), temperature=temperature))


def with_old_logprobs(experience: Experience, scores: Sequence[TokenScores]) -> Experience:
    """The same rows with the log-probs of the policy before its update."""
    rows = [replace(row, old_logprobs=own.logprobs) for row, own in zip(experience.rows, scores, strict=True)]
    return replace(experience, rows=rows)


def with_reference_logprobs(experience: Experience, scores: Sequence[TokenScores]) -> Experience:
    """The same rows with the log-probs of a frozen policy, for a divergence from it."""
    rows = [replace(row, reference_logprobs=own.logprobs) for row, own in zip(experience.rows, scores, strict=True)]
    return replace(experience, rows=rows)


def corrected(experience: Experience, config: CorrectionConfig) -> tuple[Experience, dict[str, float]]:
    """Rows that have old log-probs with their importance weights, and figures of all of them.

    The same on every rank, for all have all rows; nothing is weighed, and no figure given, for the kind ``none``.
    """
    if config.correction == "none":
        return experience, {}
    made = [_corrected_row(row, config) for row in experience.rows]
    rows = [replace(row, weights=own.weights_T.tolist()) for row, own in zip(experience.rows, made, strict=True)]
    weights = torch.cat([own.weights_T for own in made]) if made else torch.zeros(0)
    figures = {
        "correction/rejected_tokens": float((weights == 0).sum()),
        "correction/vetoed_rollouts": float(sum(own.vetoed for own in made)),
        "correction/truncated_tokens": float(sum(own.truncated for own in made)),
        "correction/kept_tokens": float((weights > 0).sum()),
        "correction/weight_sum": float(weights.sum()),
    }
    share = effective_share(weights)
    return replace(experience, rows=rows), figures | ({} if share is None else {"correction/effective_share": share})


def _corrected_row(row: ExperienceRow, config: CorrectionConfig) -> CorrectedRow:
    assert row.old_logprobs is not None, "a correction compares with the policy before its update"
    level: Level = config.level  # type: ignore[assignment]  # the kinds are made of the levels
    return correction_weights(
        torch.tensor(row.old_logprobs, dtype=torch.float64),
        torch.tensor(row.rollout.logprobs, dtype=torch.float64),
        level=level,
        masks=config.masks,
        low=config.low,
        high=config.high,
        veto=config.correction_veto,
    )
