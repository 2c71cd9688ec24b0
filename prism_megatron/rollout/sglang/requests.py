"""What a prompt looks like to SGLang's ``/generate``, and what its answer means. No connection is made here.

SGLang expands image pads itself and must be given exactly one for each image: expanded pads make it fail, and without
a pad it tokenises the prompt again, silently. So pads are collapsed, and the length it reports is checked.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.data.segments import GOES_ON
from prism_megatron.errors import DataError, RolloutError
from prism_megatron.rollout.base import Sampling, Watch
from prism_megatron.types import FinishReason, ImageInput, Prompt, VersionSpan

BARRED = 20.0
"""By how much the log-prob of a token that must not be sampled is lowered: to a two-billionth of its probability."""


@dataclass(frozen=True)
class Answer:
    """One sampled response as the server gave it. ``versions`` is None where a token is of no version of ours."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...] | None


class RequestFormat:
    """Turns prompts of one model into requests, and answers into tokens with log-probs."""

    def __init__(
        self,
        preprocessor: ImagePreprocessor,
        *,
        image_token_id: int,
        end_token_ids: Sequence[int],
        never_sampled: Sequence[int],
    ) -> None:
        self._preprocessor = preprocessor
        self._image_token_id = image_token_id
        self.end_token_ids = list(end_token_ids)
        self._never_sampled = list(never_sampled)

    def request(self, prompt: Prompt, n: int, sampling: Sampling) -> dict[str, Any]:
        """The body of a request for ``n`` samples; the images travel once for all of them.

        Raises DataError, naming the prompt, for images that the server would see otherwise than the policy does.
        """
        try:
            images = [self._data_url(image) for image in prompt.images]
        except DataError as error:
            raise DataError(f"prompt {prompt.id!r}: {error}") from error
        bias = -BARRED * (sampling.temperature or 1.0)  # the server adds it before it divides by the temperature
        return {
            "input_ids": [self.collapse(prompt)],  # a batch of one, as images of a single prompt need beside n
            **({"image_data": [images]} if images else {}),
            "sampling_params": {
                "n": n,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_new_tokens": sampling.max_new_tokens,
                "stop_token_ids": self.end_token_ids,
                "stop_regex": GOES_ON,
                "logit_bias": {str(token): bias for token in self._never_sampled},
                "skip_special_tokens": False,
            },
            "return_logprob": True,
            "token_ids_logprob": self._never_sampled,
        }

    def scoring_request(self, prompt: Prompt, response: Sequence[int]) -> dict[str, Any]:
        """The body of a request for the log-probs of a given response. Raises as ``request``."""
        body = self.request(prompt, 1, Sampling(max_new_tokens=1))
        return body | {"input_ids": [[*body["input_ids"][0], *response]], "logprob_start_len": 0}

    def scores(self, prompt: Prompt, response: Sequence[int], answer: Any) -> tuple[float, ...]:
        """The log-probs, at temperature 1, out of the answer to a ``scoring_request``.

        Raises RolloutError for an answer that is not to it.
        """
        wanted = len(prompt.token_ids) + len(response)
        try:
            meta = answer[0]["meta_info"]
            read, scored = meta["prompt_tokens"], meta["input_token_logprobs"][-len(response) :]
            logprobs = tuple(float(entry[0]) for entry in scored)
            tokens = [int(entry[1]) for entry in scored]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RolloutError(
                f"prompt {prompt.id!r}: the server's scores are not in the protocol of SGLang 0.5.23: {error!r}"
            ) from error
        # The last id of the vocabulary is scored like any other, and reported as 0: above it are hashes of images.
        same = len(tokens) == len(response) and all(
            pair[0] in (pair[1], 0) for pair in zip(tokens, response, strict=True)
        )
        if read != wanted or not same:
            raise RolloutError(
                f"prompt {prompt.id!r} with its answer has {wanted} tokens and the server read {read}; its tokenizer "
                "or its image settings are not the policy's"
            )
        return logprobs

    def collapse(self, prompt: Prompt) -> list[int]:
        """The prompt's ids with one pad an image. Raises DataError if pads and images do not agree."""
        token_ids: list[int] = []
        num_images = 0
        pads = [self._preprocessor.num_tokens(image.grid_thw) for image in prompt.images]
        for is_pad, run in itertools.groupby(prompt.token_ids, key=self._image_token_id.__eq__):
            if not is_pad:
                token_ids.extend(run)
                continue
            length = len(list(run))
            # Neighbouring images leave one run, which holds the pads of both.
            while length > 0 and num_images < len(pads):
                length -= pads[num_images]
                num_images += 1
                token_ids.append(self._image_token_id)
            if length != 0:
                raise DataError(f"prompt {prompt.id!r}: its image pads are not those of its images; render it again")
        if num_images != len(pads):
            raise DataError(f"prompt {prompt.id!r} has {len(pads)} images and pads for {num_images}; render it again")
        return token_ids

    def _data_url(self, image: ImageInput) -> str:
        picture = self._preprocessor.picture(image)
        if self._preprocessor.num_tokens_of_size(picture.size) != self._preprocessor.num_tokens(image.grid_thw):
            raise DataError(
                f"an image of {picture.width}x{picture.height} pixels is outside the size limits of the model's "
                "preprocessor_config.json, so the server would resize it; use a smaller or less narrow image"
            )
        png = io.BytesIO()
        picture.save(png, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()

    def answers(self, prompt: Prompt, n: int, answer: Any) -> list[Answer] | None:
        """The ``n`` samples of an answer; None if the server broke one off, as a pause or an abort does.

        Raises RolloutError for an answer that is not to this prompt, or not in the protocol.
        """
        if not isinstance(answer, list) or len(answer) != n:
            given = len(answer) if isinstance(answer, list) else type(answer).__name__
            raise RolloutError(f"prompt {prompt.id!r}: {n} samples were asked for, the server answers with {given}")
        try:
            parsed = [self._answer(prompt, sample) for sample in answer]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RolloutError(
                f"prompt {prompt.id!r}: the server's answer is not in the protocol of SGLang 0.5.23: {error!r}"
            ) from error
        kept = [sample for sample in parsed if sample is not None]
        return kept if len(kept) == n else None

    def _answer(self, prompt: Prompt, sample: Mapping[str, Any]) -> Answer | None:
        meta = sample["meta_info"]
        if meta["prompt_tokens"] != len(prompt.token_ids):
            raise RolloutError(
                f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens and the server read {meta['prompt_tokens']}; "
                "its tokenizer or its image settings are not the policy's"
            )
        reason = meta["finish_reason"]["type"]
        if reason == "abort":
            return None
        if reason not in ("stop", "length"):
            raise ValueError(f"finish reason {reason!r}")
        token_ids = tuple(int(token) for token in sample["output_ids"])
        scored = meta["output_token_logprobs"]
        if len(scored) != len(token_ids) or any(
            int(entry[1]) != token for entry, token in zip(scored, token_ids, strict=True)
        ):
            raise ValueError(f"{len(scored)} log-probs that are not those of {len(token_ids)} tokens")
        barred = meta["output_token_ids_logprobs"]
        logprobs = tuple(float(entry[0]) - _barred_share(others) for entry, others in zip(scored, barred, strict=True))
        if not token_ids or not math.isfinite(sum(logprobs)):
            raise RolloutError(
                f"prompt {prompt.id!r}: the server's log-probs are not finite; the policy has diverged; go back to an "
                "older checkpoint, with a lower learning rate"
            )
        return Answer(token_ids, logprobs, _versions(meta["weight_versions"], len(token_ids)))


def ending(
    prompt: Prompt, token_ids: Sequence[int], watch: Watch, *, end_token_ids: Collection[int], max_new_tokens: int
) -> tuple[int, FinishReason]:
    """How many of an answer's tokens count, and why they end there: the rule of the embedded engine.

    A server stops by patterns in decoded text, sometimes a little late, and calls it ``length`` where the end token is
    the last one allowed, so the tokens decide. Raises RolloutError where the server stopped by a rule of its own.
    """
    for length, token in enumerate(token_ids, start=1):
        if token in end_token_ids:
            return length, "stop"
        if watch.add(token):
            return length, "stop" if length < max_new_tokens else "length"
    if len(token_ids) < max_new_tokens:
        raise RolloutError(
            f"prompt {prompt.id!r}: the server ended a response after {len(token_ids)} of {max_new_tokens} tokens with "
            f"token {token_ids[-1]}, which is no end token of the policy ({sorted(end_token_ids)}); does it serve the "
            "policy's generation_config.json?"
        )
    return len(token_ids), "length"


def _barred_share(others: Sequence[Sequence[Any]]) -> float:
    """How much the server's log-probs of one position lie above those of the whole softmax.

    Lowering tokens b by ``BARRED`` scales the softmax of all others by Z / Z' = 1 + sum_b p'_b (exp(BARRED) - 1), where
    p' are the probabilities that the server reports.
    """
    return math.log1p(sum(math.exp(float(other[0])) for other in others) * math.expm1(BARRED))


def _versions(spans: Sequence[Mapping[str, Any]], length: int) -> tuple[VersionSpan, ...] | None:
    """The versions of all tokens, in order; None where there is one that no trainer gave."""
    covered = [(int(span["start"]), int(span["end"])) for span in spans]
    ends = [end for _, end in covered]
    if [start for start, _ in covered] != [0, *ends[:-1]] or ends[-1:] != [length]:
        raise ValueError(f"weight versions that do not cover {length} tokens: {covered}")
    versions = [str(span["version"]) for span in spans]
    if not all(version.isdecimal() for version in versions):
        return None
    return tuple(VersionSpan(int(version), *ends) for version, ends in zip(versions, covered, strict=True))
