"""Rollouts without a server: a transformers replica in the trainer's own process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.conversion.announced_weights import left_out_of
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.errors import ConfigError, DataError, PrismError, WeightSyncError
from prism_megatron.observability.activity import Activity, Advance
from prism_megatron.rollout.base import SampleRequest, Sampling, SegmentFinder
from prism_megatron.rollout.decode import Decoder
from prism_megatron.rollout.replica import build_replica, copy_weights
from prism_megatron.rollout.sampling import choose_tokens, keyed_uniforms
from prism_megatron.types import Prompt, Rollout, VersionSpan

ROWS_PER_BATCH = 128
"""Samples decoded at once by default."""

_COMPACT_BELOW = 7 / 8
"""Rows that ended leave the batch once the running share falls below this: dropping them copies the rest's new keys."""


class EmbeddedRollout:
    """A RolloutEngine. A rank that has one holds a whole replica and draws its own share of the samples.

    Image and video placeholder tokens are never sampled: no model could read them back without their image. A response
    ends with an end token, or with what makes it invalid after ``</answer>``: sampling on could not mend it.
    """

    expert_layout: ExpertLayout = "transformers"

    def __init__(
        self,
        model_folder: Path,
        finder: SegmentFinder,
        *,
        end_token_ids: Sequence[int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rows_per_batch: int = ROWS_PER_BATCH,
    ) -> None:
        """``model_folder`` needs only a ``config.json``; weights come from ``update_weights``.

        A response ends with the first of ``end_token_ids``. ``rows_per_batch`` bounds the samples decoded at once,
        and with them the memory of keys and values; prompts are taken in that many rows, never less than one prompt.
        """
        if not end_token_ids:
            raise ConfigError("embedded rollouts need at least one end token id, or no response ever ends")
        self.activity = Activity()
        """what is told of answers that are finished, of this rank's share"""
        self._finder = finder
        self._device = device
        self._rows_per_batch = rows_per_batch
        self._end_token_ids = torch.tensor(list(end_token_ids), device=device)
        self._model = build_replica(model_folder, device=device, dtype=dtype)
        self._decoder = Decoder(self._model)
        config = self._model.config
        self._max_positions: int = config.text_config.max_position_embeddings
        placeholders = {config.image_token_id, config.video_token_id}
        self._never_sampled = torch.tensor(
            [token for token in placeholders if 0 <= token < config.text_config.vocab_size], device=device
        ).long()
        self._version: int | None = None

    @property
    def policy_version(self) -> int | None:
        """Version of the weights in use; None until a first complete update."""
        return self._version

    @torch.no_grad()
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Overwrite all weights in place, but for those that ``AnnouncedWeights`` leave out.

        Raises WeightSyncError; then nothing can be generated until an update of all weights succeeds.
        """
        left_out = left_out_of(tensors)
        if left_out and self._version is None:
            raise WeightSyncError(f"{len(left_out)} weights are left out and the replica has none; give it all first")
        self._version = None
        copy_weights(self._model, tensors, left_out=left_out)
        self._version = version

    @torch.no_grad()
    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Draw what is asked for; see ``SampleRequest`` for the keys.

        Another split of the prompts draws the same tokens unless a uniform number falls within float rounding (about
        1e-6) of a boundary between two tokens. Raises WeightSyncError before a first complete update, DataError for
        a prompt that leaves no room for ``max_new_tokens``, and PrismError if the policy's logits are not finite.
        """
        if self._version is None:
            raise WeightSyncError("the rollout model has no complete set of weights; call update_weights first")
        prompts, sampling, wanted = request.prompts, request.sampling, request.wanted
        for prompt in prompts:
            if len(prompt.token_ids) + sampling.max_new_tokens > self._max_positions:
                raise DataError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens; with {sampling.max_new_tokens} new ones "
                    f"it exceeds the model's {self._max_positions} positions; shorten it or lower max_new_tokens"
                )
        rollouts: list[tuple[Rollout, ...]] = []
        with self.activity.task("answers", total=sum(map(len, wanted))) as advance:
            for batch in self._batches([len(numbers) for numbers in wanted]):
                numbers = wanted[batch.start : batch.stop]
                first = request.prompt_offset
                keys = [(first + p, sample) for p, some in zip(batch, numbers, strict=True) for sample in some]
                uniforms = keyed_uniforms(
                    seed=request.seed,
                    step=request.step,
                    rows=keys,
                    num_positions=sampling.max_new_tokens,
                    device=self._device,
                )
                counts = [len(some) for some in numbers]
                rows = iter(self._sample(prompts[batch.start : batch.stop], counts, sampling, uniforms, advance))
                rollouts += [tuple(islice(rows, count)) for count in counts]
                if request.finished is not None:
                    for place in batch:
                        request.finished(place, rollouts[place])
        return rollouts

    def _batches(self, counts: Sequence[int]) -> Iterator[range]:
        """Ranges of prompts whose rows are decoded together."""
        start, rows = 0, 0
        for p, count in enumerate(counts):
            if rows and rows + count > self._rows_per_batch:
                yield range(start, p)
                start, rows = p, 0
            rows += count
        if rows:
            yield range(start, len(counts))

    def _sample(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        uniforms_R_T: Tensor,
        advance: Advance,
    ) -> list[Rollout]:
        """Decode all rows of one batch until each has ended or is full; ``advance`` is told of those that have."""
        logits, state = self._decoder.prefill(prompts, counts, sampling.max_new_tokens)
        num_rows = told_running = sum(counts)
        tokens_R_T = torch.zeros(uniforms_R_T.shape, dtype=torch.long, device=self._device)
        logprobs_R_T = torch.zeros(uniforms_R_T.shape, device=self._device)
        rows = torch.arange(num_rows, device=self._device)  # of the whole batch, those in the decode state
        running = torch.ones(num_rows, dtype=torch.bool, device=self._device)
        watches = [self._finder.watch() for _ in range(num_rows)]
        lengths = [sampling.max_new_tokens] * num_rows
        for t in range(sampling.max_new_tokens):
            tokens, logprobs = choose_tokens(logits, uniforms_R_T[rows, t], sampling, self._never_sampled)
            # A row that has ended but not left yet goes on being written; what follows its end token is never read.
            tokens_R_T[rows, t] = tokens
            logprobs_R_T[rows, t] = logprobs
            running &= ~torch.isin(tokens, self._end_token_ids)
            for place, (row, token, runs) in enumerate(
                zip(rows.tolist(), tokens.tolist(), running.tolist(), strict=True)
            ):
                if runs and watches[row].add(token):
                    running[place] = False
                    lengths[row] = t + 1
            num_running = int(running.sum())
            advance(told_running - num_running)
            told_running = num_running
            if num_running == 0 or t + 1 == sampling.max_new_tokens:
                break
            if num_running < _COMPACT_BELOW * len(rows):
                kept = running.nonzero()[:, 0]
                state.keep(kept)
                rows, tokens, running = rows[kept], tokens[kept], running[kept]
            logits = self._decoder.step(tokens, state)
        advance(told_running)  # what was cut at its length
        return self._finish(tokens_R_T, logprobs_R_T, lengths)

    def _finish(self, tokens_R_T: Tensor, logprobs_R_T: Tensor, lengths: Sequence[int]) -> list[Rollout]:
        """Cut each row after its first end token, or at its entry of ``lengths``, and find its segments."""
        assert self._version is not None
        is_end_R_T = torch.isin(tokens_R_T, self._end_token_ids)
        stopped = is_end_R_T.any(dim=1).tolist()
        first_end = is_end_R_T.int().argmax(dim=1).tolist()
        rollouts = []
        for r, (tokens, logprobs) in enumerate(zip(tokens_R_T.tolist(), logprobs_R_T.tolist(), strict=True)):
            length = min(lengths[r], first_end[r] + 1 if stopped[r] else len(tokens))
            if not math.isfinite(sum(logprobs[:length])):
                raise PrismError(
                    f"policy version {self._version} gives logits that are not finite; it has diverged; go back to an "
                    "older checkpoint, with a lower learning rate"
                )
            rollouts.append(
                Rollout(
                    token_ids=tuple(tokens[:length]),
                    logprobs=tuple(logprobs[:length]),
                    finish_reason="stop" if stopped[r] or length < len(tokens) else "length",
                    versions=(VersionSpan(self._version, 0, length),),
                    segments=self._finder.find(tokens[:length]),
                )
            )
        return rollouts

    def sleep(self) -> None:
        """Nothing: the replica keeps its weights, and keys and values live no longer than a ``generate``."""

    def wake(self) -> None:
        """Nothing: the replica never sleeps."""

    def close(self) -> None:
        """Release the replica's memory; the engine cannot be used afterwards. May be called again."""
        self._version = None
        for part in ("_decoder", "_model"):
            vars(self).pop(part, None)
