"""From a conversation to one row of supervised training: token ids, which of them are labels, and patches of pixels.

The chat template renders the whole conversation once and the tokenizer reads that text once, so ids are those of
transformers' ``processor.apply_chat_template(messages, tokenize=True)``, token for token. Labels are what the assistant
says, with the end token after it; they are found by the offsets of characters that the tokenizer gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from jinja2 import TemplateError

from prism_megatron.data.conversation import Conversation, Picture, Turn
from prism_megatron.data.pictures.files import image_size, open_image
from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import TAGS
from prism_megatron.data.tokenizer import END_TOKEN
from prism_megatron.errors import DataError
from prism_megatron.types import TokenSequence

LabelTurns = Literal["last", "all"]
"""Which of the assistant's turns are learned."""

_ASSISTANT = "<|im_start|>assistant\n"
_THINK = (f"<{TAGS[1]}>", f"</{TAGS[1]}>")
_PROBED_SIDES = [round(16 * 1.1**i) for i in range(64)]


class Lengths(NamedTuple):
    """Tokens of one rendered conversation. Its length is ``text_tokens + visual_tokens``; labels are text."""

    text_tokens: int
    visual_tokens: int
    label_tokens: int


@dataclass(frozen=True)
class _Rendered:
    token_ids: list[int]
    """with one image pad for each picture"""
    labels: list[range]
    """positions of the labels, a range for each turn that is learned"""


class ConversationRenderer:
    """Renders conversations as one ``Renderer`` renders prompts: its tokenizer, template, images and system prompt.

    The renderer's system prompt comes before conversations that have no system turn of their own.
    """

    def __init__(self, renderer: Renderer, *, label_turns: LabelTurns) -> None:
        self._renderer = renderer
        self._label_turns: LabelTurns = label_turns

    def __call__(self, conversation: Conversation) -> tuple[TokenSequence, list[float]]:
        """One row and its loss mask, both over the same positions, as ``Renderer.training_row`` gives them.

        Raises DataError, naming the conversation, for text with added tokens, a template that rewrites what the
        assistant says, and pictures that cannot be read.
        """
        renderer = self._renderer
        try:
            rendered = self._rendered(conversation)
            images = tuple(renderer.preprocessor(open_image(picture.stored)) for picture in conversation.pictures)
        except DataError as error:
            raise DataError(f"{conversation.id}: {error}") from error
        pads = iter([renderer.preprocessor.num_tokens(image.grid_thw) for image in images])
        label = {position for positions in rendered.labels for position in positions}
        token_ids: list[int] = []
        mask: list[float] = []
        for position, token_id in enumerate(rendered.token_ids):
            count = next(pads) if token_id == renderer.image_token_id else 1
            token_ids.extend([token_id] * count)
            mask.extend([float(position in label)] * count)
        return TokenSequence(tuple(token_ids), images), mask

    def measure(self, conversation: Conversation) -> Lengths:
        """What a call would give, counted; of pictures only the headers are read. Raises DataError as a call."""
        try:
            rendered = self._rendered(conversation)
            sizes = [image_size(picture.stored) for picture in conversation.pictures]
            visual = sum(map(self._renderer.preprocessor.num_tokens_of_size, sizes))
        except DataError as error:
            raise DataError(f"{conversation.id}: {error}") from error
        return Lengths(len(rendered.token_ids) - len(sizes), visual, sum(map(len, rendered.labels)))

    @property
    def fingerprint(self) -> str:
        """Hash of all that ``measure`` depends on beside the conversation.

        Of the image preprocessor it is its limits and what it makes of 4,096 sizes: the rest changes no length.
        """
        renderer, digest = self._renderer, hashlib.sha256()
        counts = []
        for height in _PROBED_SIDES:
            for width in _PROBED_SIDES:
                try:
                    counts.append(renderer.preprocessor.num_tokens_of_size((width, height)))
                except DataError:  # too long for its width; that it is refused is part of the hash
                    counts.append(0)
        for piece in (
            renderer.tokenizer.backend_tokenizer.to_str(),
            str(renderer.tokenizer.chat_template),
            repr(renderer.system_prompt),
            self._label_turns,
            repr([renderer.preprocessor.area_limits, counts]),
        ):
            digest.update(hashlib.sha256(piece.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()

    def _rendered(self, conversation: Conversation) -> _Rendered:
        for turn in conversation.turns:
            self._check_text(turn)
        text = self._chat_text(conversation.turns)
        encoding = self._renderer.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        token_ids: list[int] = encoding.ids
        if token_ids.count(self._renderer.image_token_id) != len(conversation.pictures):
            raise DataError("the chat template does not give every picture one place")
        labels = [_tokens_of(encoding, *span) for span in self._label_spans(text, conversation.turns)]
        return _Rendered(token_ids, labels)

    def _label_spans(self, text: str, turns: Sequence[Turn]) -> list[tuple[int, int]]:
        """Characters of the assistant's turns that are learned, their end tokens included.

        No turn can hold ``<|im_start|>``, so every one of them is the template's.
        """
        spans: list[tuple[int, int]] = []
        position = 0
        for turn in turns:
            if turn.role != "assistant":
                continue
            says = "".join(cast(tuple[str, ...], turn.parts)) + END_TOKEN
            position = text.find(_ASSISTANT, position) + len(_ASSISTANT)
            if position < len(_ASSISTANT) or not text.startswith(says, position):
                raise DataError(
                    f"the chat template of {self._renderer.tokenizer.name_or_path} does not render what the assistant "
                    "says as it stands; use that of a Qwen3-VL Instruct model"
                )
            spans.append((position, position + len(says)))
        return spans if self._label_turns == "all" else spans[-1:]

    def _chat_text(self, turns: Sequence[Turn]) -> str:
        renderer = self._renderer
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": _content(turn)} for turn in turns]
        if renderer.system_prompt is not None and turns[0].role != "system":
            messages.insert(0, {"role": "system", "content": renderer.system_prompt})
        try:
            text: str = renderer.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            name = renderer.tokenizer.name_or_path
            raise DataError(f"the chat template of {name} cannot be used: {error}") from error
        return text

    def _check_text(self, turn: Turn) -> None:
        """Raise DataError for added tokens in a turn, but for the tags that our own layout is written with.

        The assistant may think once; a system message may show how to.
        """
        text = "\n".join(part for part in turn.parts if isinstance(part, str))
        thinks_once = turn.role == "assistant" and text.count(_THINK[0]) == text.count(_THINK[1]) <= 1
        if thinks_once or turn.role == "system":
            text = text.replace(_THINK[0], " ").replace(_THINK[1], " ")
        self._renderer.refuse_added_tokens(f"a turn of the {turn.role}", text)


def _tokens_of(encoding: Any, start: int, end: int) -> range:
    """The tokens that lie in these characters, of which the last is one token's last.

    A token that begins before them, in a line end that it shares with the turn's first, could never be sampled.
    """
    first = encoding.char_to_token(start)
    return range(first + (encoding.offsets[first][0] < start), encoding.char_to_token(end - 1) + 1)


def _content(turn: Turn) -> str | list[dict[str, str]]:
    if turn.role != "user":
        return "".join(cast(tuple[str, ...], turn.parts))
    return [{"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": part} for part in turn.parts]
