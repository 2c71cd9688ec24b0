"""An OpenAI-compatible endpoint answers: what it is sent, by how many at a time, and what counts as a failure.

A request has the system prompt as text, then one turn of the user: the image as a data URL and the question, from
which a Qwen3-VL's chat template makes the prompt of training (docs/using_a_result.md).
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from prism_megatron.config.tools.evaluate import API_KEY, EvaluateConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.model_names import folder_of
from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.render import Renderer
from prism_megatron.endpoints.chat import key_of
from prism_megatron.errors import ConfigError
from prism_megatron.stages.evaluate.chat_client import ChatClient, RefusedError, Reply, UnansweredError
from prism_megatron.stages.evaluate.policy import Settings, prompt_of, settings_of, too_long
from prism_megatron.stages.evaluate.questions import Batch, Question
from prism_megatron.stages.evaluate.said import Said, until_it_goes_on
from prism_megatron.training.prompts import renderer_of

_REMEDY = "--request-fields adds a field or takes one away, --max-response-tokens asks for less"
_REMEDIES = {413: "--max-pixels beside --served-files sends smaller images"}
"""What may mend requests that are refused as such, for all statuses and for some."""


@dataclass(frozen=True)
class Served:
    """What stands in every request, and how failures are taken."""

    model: str
    system_prompt: str | None
    fields: Mapping[str, Any]
    """over those that are sent anyway; one that is None is not sent"""
    counts_unanswered: bool
    """as failures; else they end the evaluation, and so does an endpoint that refuses whatever it is asked"""


@dataclass(frozen=True)
class Asked:
    """A question as the endpoint is sent it; ``tokens`` is what it has to be read as, where that is known."""

    image: Image.Image
    tokens: int | None


class EndpointAsker:
    """An ``Asker``. Without a ``renderer``, images are sent as they are, and prompts are not measured."""

    def __init__(
        self,
        client: ChatClient,
        served: Served,
        settings: Settings,
        *,
        renderer: Renderer | None,
        at_once: int,
        has_answered: bool,
    ) -> None:
        """``has_answered``: an earlier part of the evaluation has answers from it."""
        self._has_answered = has_answered
        self._client, self._served, self._settings, self._renderer = client, served, settings, renderer
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="requests")

    def ask(self, batch: Batch) -> list[list[Said]]:
        """Raises UnansweredError where a request got no answer, unless such count as failures; ConfigError where the
        endpoint takes none of ours, or reads another prompt; ImageError for an image that cannot be read."""
        work: list[list[Callable[[], Said | RefusedError]]] = [
            self._work_of(question, batch.key("sampled")) for question in batch.questions
        ]
        under_way = [[self._threads.submit(one) for one in own] for own in work]
        try:
            said = [[future.result() for future in own] for own in under_way]
        except BaseException:
            self._client.give_up()
            for own in under_way:
                for future in own:
                    future.cancel()
            raise
        self._check_taken([one for own in said for one in own])
        return [[Said(failure=str(one)) if isinstance(one, RefusedError) else one for one in own] for own in said]

    def close(self) -> None:
        """End what is under way."""
        self._client.close()
        self._threads.shutdown(cancel_futures=True)

    def _check_taken(self, said: Sequence[Said | RefusedError]) -> None:
        """Raise ConfigError where the endpoint has never answered, and refuses all of these with the same 4xx.

        It dislikes the form of the requests then, and not a question. Earlier answers are on the disk, so that an
        evaluation that goes on decides as one that nothing interrupted.
        """
        self._has_answered |= any(isinstance(one, Said) and not one.failure for one in said)
        refused = [one for one in said if isinstance(one, RefusedError)]
        statuses = {one.http_status for one in refused}
        if self._has_answered or self._served.counts_unanswered or len(statuses) != 1:
            return
        if (status := statuses.pop()) is not None and 400 <= status < 500:
            raise ConfigError(
                f"{self._client.url} has answered nothing yet, and refuses each of these {len(refused)} requests: "
                f"{refused[0]}; {_REMEDIES.get(status, _REMEDY)}, and --on-unanswered count takes such for failures"
            )

    def _work_of(self, question: Question, key: int) -> list[Callable[[], Said | RefusedError]]:
        asked, settings = self._asked(question), self._settings
        if asked.tokens is not None and asked.tokens > settings.max_prompt_tokens:
            failure = Said(failure=too_long(asked.tokens, settings.max_prompt_tokens))
            return [lambda: failure] * (1 + settings.samples)
        messages = self._messages(question, asked.image)
        bodies = [self._body(messages, {"temperature": 0})]
        for number in range(settings.samples):
            drawn = {
                "temperature": settings.sampled.temperature,
                "top_p": settings.sampled.top_p,
                "seed": _seed(settings.seed, key, question.item.id, number),
            }
            bodies.append(self._body(messages, drawn))
        return [partial(self._say, body, asked, question) for body in bodies]

    def _asked(self, question: Question) -> Asked:
        if self._renderer is None:
            return Asked(to_rgb(question.image()), None)
        prompt = prompt_of(question, self._renderer)
        return Asked(self._renderer.preprocessor.picture(prompt.images[0]), len(prompt.token_ids))

    def _messages(self, question: Question, image: Image.Image) -> list[dict[str, Any]]:
        system = [] if self._served.system_prompt is None else [
            {"role": "system", "content": self._served.system_prompt}
        ]  # fmt: skip
        content = [
            {"type": "image_url", "image_url": {"url": data_url(image)}},
            {"type": "text", "text": question.text},
        ]
        return [*system, {"role": "user", "content": content}]

    def _body(self, messages: list[dict[str, Any]], drawing: Mapping[str, Any]) -> dict[str, Any]:
        length = {"max_tokens": self._settings.sampled.max_new_tokens}
        body = {"model": self._served.model, "messages": messages, **length, **drawing, **self._served.fields}
        return {name: value for name, value in body.items() if value is not None}

    def _say(self, body: Mapping[str, Any], asked: Asked, question: Question) -> Said | RefusedError:
        try:
            reply = self._client.ask(body)
        except RefusedError as error:
            return error
        except UnansweredError as error:
            if not self._served.counts_unanswered:
                raise UnansweredError(
                    f"{question.item.id}: {error}; the same command with this --output goes on, or --on-unanswered "
                    "count takes such for failures"
                ) from error
            return Said(failure=str(error))
        self._check_read(reply, asked, question)
        text = until_it_goes_on(reply.text) if self._settings.strict_format else reply.text
        whole, truncated = text == reply.text, reply.truncated
        return Said(text, ended=whole and not truncated, truncated=whole and truncated, tokens=reply.tokens)

    def _check_read(self, reply: Reply, asked: Asked, question: Question) -> None:
        if asked.tokens is not None and reply.prompt_tokens not in (asked.tokens, None):
            raise ConfigError(
                f"{question.item.id}: the endpoint read {reply.prompt_tokens} tokens where --served-files makes "
                f"{asked.tokens}; name the model that is served, and see that its chat template and image settings are "
                "those of its folder"
            )


def data_url(image: Image.Image) -> str:
    """The picture, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _seed(seed: int, key: int, name: str, number: int) -> int:
    """What a server that takes seeds draws a sample from; the same for a question that is asked again."""
    text = f"{seed}|{key}|{name}|{number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 2**31


def build_endpoint_asker(config: EvaluateConfig, url: str, *, has_answered: bool) -> EndpointAsker:
    """For an endpoint, which is not asked yet; ``has_answered`` as there.

    Raises PrismError where --served-files names no policy.
    """
    endpoint = config.endpoint
    renderer = None
    if endpoint.served_files is not None:
        folder = folder_of(endpoint.served_files, "policy", flag="--served-files")
        renderer = renderer_of(files_folder(folder, "policy"), config.as_trained)
    assert endpoint.served_model is not None, "the checks ask for --served-model"
    client = ChatClient(
        url,
        api_key=key_of(os.environ.get(API_KEY, ""), API_KEY),
        seconds=endpoint.request_seconds,
        attempts=endpoint.request_attempts,
    )
    served = Served(endpoint.served_model, config.system_prompt, endpoint.fields, endpoint.on_unanswered == "count")
    return EndpointAsker(
        client,
        served,
        settings_of(config),
        renderer=renderer,
        at_once=endpoint.requests_at_once,
        has_answered=has_answered,
    )
