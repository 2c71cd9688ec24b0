"""Where the judged parts of a response lie, exact in token space.

A response is ``<caption>..</caption> <think>..</think> <answer>..</answer>`` and the end token. Tags may be split
over tokens in any way, and one token may hold the end of one tag and the start of the next, so tags are located in
the bytes of the response and mapped back through the byte offset of every token: nothing is decoded and re-encoded.

The rule is strict (docs/method.md, section 2): exactly one of each tag, in this order, nothing but white space outside,
no empty body, ended by the end token. ``<thought>`` is accepted as an alias of ``<think>``. The lax rule is that of
PRISM's released code, where tags may repeat or nest and bodies may be empty.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.types import Segments, Span

TAGS = ("caption", "think", "answer")
THINK_ALIAS = "thought"
_ANSWER_CLOSES = f"</{TAGS[-1]}>".encode()
GOES_ON = rf"</{TAGS[-1]}>[\s\ufffd]{{0,16}}[^\s\ufffd]"
"""Regular expression that finds, in decoded text, what an ``AnswerWatch`` finds in tokens, and never sooner.

A replacement character may be the first bytes of white space, so it does not count. The run of white space is bounded:
servers decode as many tokens at every step as the longest match has characters. After a longer one it finds nothing.
"""
# The tags of the lax rule, in order; a body ends at the first place where the next pattern matches.
_LAX_START = re.compile(r"\s*(?=<caption>)")
_LAX_CAPTION_ENDS = re.compile(r"</caption>(?=\s*<(think|thought)>)")
_LAX_THINK_ENDS = re.compile(r"</(think|thought)>(?=\s*<answer>)")


@dataclass(frozen=True)
class TaggedText:
    """The three bodies of a valid response and the byte ranges of its two judged parts."""

    caption: str
    think: str
    answer: str
    perception_bytes: Span
    reasoning_bytes: Span


def response_text(caption: str, think: str, answer: str) -> str:
    """The one layout in which responses are written, without the end token."""
    return f"<caption>\n{caption}\n</caption>\n<think>\n{think}\n</think>\n<answer>{answer}</answer>"


def parse_response(data: bytes) -> TaggedText | str:
    """Split the bytes of a response, without its end token. Returns what is wrong with it as text if it is invalid.

    Linear in the length; never raises. Bytes that are no UTF-8 are allowed inside bodies, as a sampled response may
    hold them, and not between the tags.
    """
    names = (TAGS[0], THINK_ALIAS if f"<{THINK_ALIAS}>".encode() in data else TAGS[1], TAGS[2])
    for name in (*TAGS, THINK_ALIAS):
        for tag in (f"<{name}>", f"</{name}>"):
            count = data.count(tag.encode())
            if count != (name in names):
                return f"{tag} appears {count} times"

    bodies: list[str] = []
    bounds: list[Span] = []
    position = 0
    for name in names:
        opening, closing = f"<{name}>".encode(), f"</{name}>".encode()
        start, end = data.index(opening), data.index(closing)
        if start < position or end < start:
            return f"<{name}> is out of order"
        if _text(data[position:start]).strip():
            return f"text before <{name}>, outside the tags"
        body = _text(data[start + len(opening) : end])
        if not body.strip():
            return f"<{name}> is empty"
        position = end + len(closing)
        bodies.append(body)
        bounds.append(Span(start, position))
    if _text(data[position:]).strip():
        return "text after the last tag"
    caption, think, answer = bodies
    return TaggedText(caption, think, answer, bounds[0], Span(bounds[1].start, bounds[2].end))


def parse_lax(data: bytes) -> TaggedText | str:
    """As ``parse_response`` under the released rule, a search for the pattern ``caption think answer`` over all text.

    Its bodies are lazy: each ends at the first closing tag that the next opening tag follows, the last one at the end
    of the response. White space may stand before, between and after, and nothing else. Linear in the length.
    """
    text = data.decode("utf-8", errors="surrogateescape")  # keeps every byte, so that offsets can be mapped back
    opening = _LAX_START.match(text)
    if opening is None:
        return "<caption> is not the first thing in it"
    caption = _LAX_CAPTION_ENDS.search(text, opening.end() + len("<caption>"))
    if caption is None:
        return "no </caption> is followed by <think>"
    reasoning = text.index("<", caption.end())
    think = _LAX_THINK_ENDS.search(text, text.index(">", reasoning) + 1)
    if think is None:
        return "no </think> is followed by <answer>"
    answer = text.index(">", think.end()) + 1
    stripped = text.rstrip()
    if len(stripped) < answer + len("</answer>") or not stripped.endswith("</answer>"):
        return "it does not end in </answer>"

    def byte_span(start: int, stop: int) -> Span:
        first = len(text[:start].encode("utf-8", errors="surrogateescape"))
        return Span(first, first + len(text[start:stop].encode("utf-8", errors="surrogateescape")))

    return TaggedText(
        caption=text[opening.end() + len("<caption>") : caption.start()],
        think=text[text.index(">", reasoning) + 1 : think.start()],
        answer=stripped[answer : -len("</answer>")],
        perception_bytes=byte_span(opening.end(), caption.end()),
        reasoning_bytes=byte_span(reasoning, len(stripped)),
    )


class SegmentFinder:
    """Finds the segments of a response from its token ids alone."""

    def __init__(self, tokenizer: Any, *, strict: bool = True) -> None:
        """``tokenizer``: a Hugging Face fast tokenizer over byte-level BPE, such as Qwen's.

        ``strict=False`` takes the released rule for the text; a response still has to end in the end token, and to hold
        no control token.
        """
        self._strict = strict
        self._byte_of_character = {character: byte for byte, character in byte_alphabet().items()}
        self._vocab_size = len(tokenizer)
        self._to_token = tokenizer.convert_ids_to_tokens
        self._added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        self._end_token_id = int(tokenizer.eos_token_id)
        self._bytes_of_id: dict[int, bytes] = {}

    def find(self, token_ids: Sequence[int]) -> Segments:
        """Spans run from the first token with a byte of the opening tag to the last with one of the closing tag.

        Where one token holds bytes of both ``</caption>`` and ``<think>``, both spans include it. Never raises.
        """
        if not token_ids or token_ids[-1] != self._end_token_id:
            return _invalid("the response does not end in the end token")
        starts: list[int] = []  # byte offset of each token
        pieces: list[bytes] = []
        length = 0
        for token_id in token_ids[:-1]:
            piece = self._token_bytes(token_id)
            if piece is None:
                return _invalid(f"token {token_id} is a control token or unknown")
            starts.append(length)
            pieces.append(piece)
            length += len(piece)
        parsed = self.parse(b"".join(pieces))
        if isinstance(parsed, str):
            return _invalid(parsed)
        perception, reasoning = (
            Span(bisect_right(starts, span.start) - 1, bisect_right(starts, span.end - 1))
            for span in (parsed.perception_bytes, parsed.reasoning_bytes)
        )
        return Segments(perception, reasoning, None)

    def parse(self, data: bytes) -> TaggedText | str:
        """The bodies of a response's bytes, without its end token, or what is wrong with it."""
        return parse_response(data) if self._strict else parse_lax(data)

    def watch(self) -> AnswerWatch | NoWatch:
        """A fresh watch over one response that is being sampled."""
        return AnswerWatch(self._token_bytes) if self._strict else NoWatch()

    def _token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for; None for control tokens and for ids beyond the tokenizer."""
        if token_id not in self._bytes_of_id:
            if token_id in self._added:
                if self._added[token_id].special:
                    return None
                piece = self._added[token_id].content.encode()
            else:
                token = self._to_token(token_id) if 0 <= token_id < self._vocab_size else None
                if token is None:
                    return None
                piece = bytes(self._byte_of_character[character] for character in token)
            self._bytes_of_id[token_id] = piece
        return self._bytes_of_id[token_id]


class AnswerWatch:
    """Sees, token by token, that a response goes on after its answer and can no longer be valid."""

    def __init__(self, token_bytes: Callable[[int], bytes | None]) -> None:
        self._token_bytes = token_bytes
        self._tail = b""
        self._after: codecs.IncrementalDecoder | None = None

    def add(self, token_id: int) -> bool:
        """Take the next token; True once anything but white space and the end token follows ``</answer>``."""
        piece = self._token_bytes(token_id)
        if piece is None:
            return self._after is not None
        if self._after is None:
            data = self._tail + piece
            _, found, piece = data.partition(_ANSWER_CLOSES)
            self._tail = data[1 - len(_ANSWER_CLOSES) :]
            if not found:
                return False
            # A white-space character may be split over tokens: only whole characters are judged.
            self._after = codecs.getincrementaldecoder("utf-8")("replace")
        return bool(self._after.decode(piece).strip())


class NoWatch:
    """Under the lax rule a later ``</answer>`` may always make a response valid again."""

    def add(self, token_id: int) -> bool:
        """False: sampling on is never in vain."""
        del token_id
        return False


def byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def _invalid(problem: str) -> Segments:
    return Segments(None, None, problem)
