"""From question, images and reference to token ids. Training, rollout and evaluation all go through here.

Text from outside is never parsed for added tokens: a question holding ``<|im_start|>`` could open a role of its own,
and transformers would let it. Such text is refused with a DataError naming the record, not rewritten, because the
real tokenizer has no spelling of those characters that survives a round trip through a chat.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image
from transformers import AutoTokenizer

from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.data.pictures.pixel_limits import with_pixel_limits
from prism_megatron.data.reading.intake import ImageError, TextError
from prism_megatron.data.reading.model_files import TOKENIZER, TOKENIZER_CONFIG, chat_template
from prism_megatron.data.segments import TAGS, THINK_ALIAS, SegmentFinder, response_text
from prism_megatron.data.tokenizer import IMAGE_TOKEN
from prism_megatron.errors import DataError
from prism_megatron.types import Prompt, Response, Segments, TokenSequence

_TAGS = frozenset(f"<{slash}{name}>" for name in (*TAGS, THINK_ALIAS) for slash in ("", "/"))
_ANY_BODY = "0"
_ANY_REASONING = f"<think>\n{_ANY_BODY}\n</think>\n<answer>{_ANY_BODY}</answer>"


class Renderer:
    """The tokenizer, the chat template and the image preprocessor of one model, with one system prompt."""

    def __init__(
        self,
        tokenizer: Any,
        preprocessor: ImagePreprocessor,
        *,
        system_prompt: str | None = None,
        strict_format: bool = True,
    ) -> None:
        """``strict_format`` is that of ``SegmentFinder``.

        Raises TextError for a system prompt with added tokens other than the tags of an answer, which it may explain.
        """
        self.tokenizer = tokenizer
        self.preprocessor = preprocessor
        self.segment_finder = SegmentFinder(tokenizer, strict=strict_format)
        self.system_prompt = system_prompt
        self._added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.end_token_id = int(tokenizer.eos_token_id)
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        if system_prompt is not None:
            self.refuse_added_tokens("--system-prompt", system_prompt, allowed=_TAGS)

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        system_prompt: str | None = None,
        strict_format: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Renderer:
        """Read everything from a local Hugging Face folder, but limits of images' areas that are given.

        Raises DataError if a file is missing, ConfigError as ``with_pixel_limits``.
        """
        folder = Path(folder)
        if not (folder / TOKENIZER).is_file():
            raise DataError(f"{folder / TOKENIZER} does not exist; copy it from the model's Hugging Face folder")
        template = chat_template(folder)
        try:
            # Unasked, transformers offers to run code that a folder brings along.
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises no kind of its own
            raise DataError(f"the tokenizer of {folder} cannot be read: {' '.join(str(error).split())}") from error
        tokenizer.chat_template = template
        for name in ("pad_token", "eos_token"):
            if getattr(tokenizer, name) is None:
                raise DataError(f"{folder / TOKENIZER_CONFIG} names no {name}; copy it from the model's Hugging Face "
                                "folder")  # fmt: skip
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
            raise DataError(f"{folder / TOKENIZER} has no token {IMAGE_TOKEN}; give a Qwen3-VL's")
        preprocessor = with_pixel_limits(
            ImagePreprocessor.from_folder(folder), min_pixels=min_pixels, max_pixels=max_pixels
        )
        return cls(tokenizer, preprocessor, system_prompt=system_prompt, strict_format=strict_format)

    @property
    def control_token_ids(self) -> frozenset[int]:
        """Ids that stand for no text, the end token excepted: a sampler must never emit them."""
        return frozenset(i for i, token in self._added.items() if token.special) - {self.end_token_id}

    def prompt(self, id: str, question: str, images: Sequence[Image.Image]) -> Prompt:  # noqa: A002 the field's name
        """Images, then the question, as the user's turn; each image pad repeated once per merged patch.

        Raises DataError, naming ``id``, for text with added tokens and for images that cannot be processed.
        """
        text = self._chat_text(id, question, num_images=len(images))
        try:
            inputs = tuple(self.preprocessor(image) for image in images)
        except ImageError as error:
            raise ImageError(f"{id}: {error}") from error
        encoded = self._encode(text)
        if encoded.count(self.image_token_id) != len(images):
            raise DataError(
                f"the chat template of {self.tokenizer.name_or_path} makes {encoded.count(self.image_token_id)} places "
                f"for {len(images)} images; take the template of the model's Hugging Face folder"
            )
        pads = iter(self.preprocessor.num_tokens(image.grid_thw) for image in inputs)
        token_ids: list[int] = []
        for token_id in encoded:
            token_ids.extend([token_id] * (next(pads) if token_id == self.image_token_id else 1))
        return Prompt(id=id, token_ids=tuple(token_ids), images=inputs, question=question)

    def num_prompt_tokens(self, id: str, question: str, image_sizes: Sequence[tuple[int, int]]) -> int:  # noqa: A002
        """Length of the prompt with images of these (width, height), without reading pixels.

        Raises DataError, as ``prompt``.
        """
        text = self._chat_text(id, question, num_images=len(image_sizes))
        try:
            pads = sum(self.preprocessor.num_tokens_of_size(size) for size in image_sizes)
        except ImageError as error:
            raise ImageError(f"{id}: {error}") from error
        return len(self._encode(text)) - len(image_sizes) + pads

    def response(self, caption: str, think: str, answer: str, *, id: str = "reference") -> Response:  # noqa: A002
        """A reference in the one layout, ending in the end token that a finished rollout ends in.

        Raises DataError, naming ``id``, if the three bodies do not make a valid response.
        """
        for body in (caption, think, answer):
            self.refuse_added_tokens(id, body)
        return self._tokenised(response_text(caption, think, answer), id)

    def caption_alone(self, caption: str, *, id: str = "reference") -> Response:  # noqa: A002 the field's name
        """A reference without reasoning: a response cut off after its caption, and the end token.

        Cut from a whole one, so that its caption ends in the very tokens that a rollout's ends in: a tokenizer may
        join a closing tag with the line end that follows it. Raises as ``response``.
        """
        whole = self.response(caption, _ANY_BODY, _ANY_BODY, id=id)
        return _without_reasoning(whole)

    def answer_alone(self, answer: str, *, id: str = "reference") -> Response:  # noqa: A002 the field's name
        """A reference that no discriminator judges: what a rollout's answer is checked against, and the end token.

        Raises TextError, naming ``id``, if it holds added tokens.
        """
        self.refuse_added_tokens(id, answer)
        return Response((*self._encode(answer), self.end_token_id), Segments(None, None, "an answer alone"))

    def written(self, text: str, *, id: str) -> Response:  # noqa: A002 the field's name
        """A response as somebody wrote it, tags and all, or the tagged caption of one.

        ``<thought>`` becomes ``<think>``. Raises DataError, naming ``id``, if it is neither, or holds added tokens
        other than the tags.
        """
        for slash in ("", "/"):
            text = text.replace(f"<{slash}{THINK_ALIAS}>", f"<{slash}{TAGS[1]}>")
        is_caption = not any(f"<{tag}>" in text for tag in TAGS[1:])
        whole = f"{text.rstrip()}\n{_ANY_REASONING}" if is_caption else text
        parsed = self.segment_finder.parse(whole.encode())
        if isinstance(parsed, str):
            raise TextError(f"{id}: not a valid response: {parsed}")
        for body in (parsed.caption, parsed.think, parsed.answer):
            self.refuse_added_tokens(id, body)
        response = self._tokenised(whole, id)
        return _without_reasoning(response) if is_caption else response

    @staticmethod
    def training_row(prompt: Prompt, response: Response) -> tuple[TokenSequence, list[float]]:
        """One row of supervised training and its loss mask, both over the same positions.

        ``loss_mask[t]`` is 1 where token t is a *label*: every token of the response, the end token included. The logit
        that predicts it stands at position t - 1 (Hugging Face's unshifted ``labels``, with 0 for its -100).
        """
        row = TokenSequence((*prompt.token_ids, *response.token_ids), prompt.images)
        return row, [0.0] * len(prompt.token_ids) + [1.0] * len(response.token_ids)

    def refuse_added_tokens(self, where: str, text: str, *, allowed: Collection[str] = ()) -> None:
        """The one check of text from outside, by whatever door it comes: question, choice, reference, system prompt.

        Raises TextError, naming ``where``, if it holds a token that was added to the tokenizer and is not ``allowed``.
        """
        for token in self._added.values():
            if token.content in text and token.content not in allowed:
                raise TextError(
                    f"{where}: the text holds {token.content!r}, which the tokenizer would take for a token; spell it "
                    "otherwise"
                )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, added tokens included."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def _tokenised(self, text: str, id: str) -> Response:  # noqa: A002
        token_ids = (*self._encode(text), self.end_token_id)
        segments = self.segment_finder.find(token_ids)
        if not segments.valid:
            raise TextError(f"{id}: not a valid response: {segments.problem}")
        return Response(token_ids, segments)

    def _chat_text(self, id: str, question: str, *, num_images: int) -> str:  # noqa: A002
        self.refuse_added_tokens(id, question)
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        try:
            text: str = self.tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise DataError(f"the chat template of {self.tokenizer.name_or_path} cannot be used: {error}") from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _without_reasoning(whole: Response) -> Response:
    """The response up to the end of its caption's span, and its end token."""
    caption = whole.segments.perception
    assert caption is not None
    return Response((*whole.token_ids[: caption.end], whole.token_ids[-1]), Segments(caption, None, None))
