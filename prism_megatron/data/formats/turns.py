"""Messages of a chat, as LLaMA-Factory, ShareGPT, verl and chat templates spell them, to turns with pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from prism_megatron.data.conversation import Picture, Role, Turn
from prism_megatron.data.formats.pictures import shown
from prism_megatron.data.reading.fields import check_text
from prism_megatron.data.segments import TAGS, THINK_ALIAS, parse_response
from prism_megatron.errors import DataError

PLACEHOLDER = "<image>"
"""Stands where an image is shown; the n-th one for the n-th image."""

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def turns_of(messages: Any, pictures: Sequence[Picture], *, where: str, field: str) -> tuple[Turn, ...]:
    """A list of ``{"role", "content"}`` or ``{"from", "value"}`` as turns that end with the assistant's.

    Content is text with a placeholder for every image, or a chat template's list of text and image items. Raises
    DataError, naming ``where`` and ``field``, for other roles, another order, and images that are not shown once each.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field {field}: a list of messages expected")
    left = deque(pictures)
    turns = tuple(_turn(message, left, where, f"{field}[{i}]") for i, message in enumerate(messages))
    if left:
        places = len(pictures) - len(left)
        raise DataError(
            f"{where}: field images: {shown(pictures)} for {places} {PLACEHOLDER} in the text; each needs its own"
        )
    _check_order(turns, where, field)
    return turns


def question_turn(text: str, pictures: Sequence[Picture], *, where: str) -> Turn:
    """A user's turn: pictures where the text has placeholders for them, before the text where it has none.

    Raises DataError as ``turns_of``.
    """
    if PLACEHOLDER not in text:
        return Turn("user", (*pictures, text))
    left = deque(pictures)
    parts = _placed(text, left, where, "question")
    if left:
        raise DataError(
            f"{where}: field images: {shown(pictures)} for {len(pictures) - len(left)} {PLACEHOLDER} in the text; "
            "each needs its own"
        )
    return Turn("user", parts)


def assistant_text(text: str) -> str:
    """A response as somebody wrote it; ``<thought>`` of a valid one becomes ``<think>``."""
    if f"<{THINK_ALIAS}>" not in text or isinstance(parse_response(text.encode()), str):
        return text
    for slash in ("", "/"):
        text = text.replace(f"<{slash}{THINK_ALIAS}>", f"<{slash}{TAGS[1]}>")
    return text


def _turn(message: Any, left: deque[Picture], where: str, field: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where}: field {field}: an object with role and content, or from and value, expected")
    spelled = message.get("role", message.get("from"))
    role = ROLES.get(spelled) if isinstance(spelled, str) else None
    if role is None:
        raise DataError(f"{where}: field {field}: role {spelled!r} is none of {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    parts = _content(content, left, where, field)
    if role == "user":
        return Turn(role, parts)
    if any(isinstance(part, Picture) for part in parts):
        raise DataError(f"{where}: field {field}: {PLACEHOLDER} in what the {role} says; only users show images")
    text = "".join(part for part in parts if isinstance(part, str))
    return Turn(role, (assistant_text(text) if role == "assistant" else text,))


def _content(content: Any, left: deque[Picture], where: str, field: str) -> tuple[str | Picture, ...]:
    if not isinstance(content, list):
        check_text(content, field, where)
        return _placed(content, left, where, field)
    parts: list[str | Picture] = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text":
            check_text(item.get("text"), field, where)
            parts.append(item["text"])
        elif kind == "image":
            parts.append(_next(left, where, field))
        else:
            raise DataError(f"{where}: field {field}: items of type text and image expected, not {str(item)[:40]!r}")
    if not parts:
        raise DataError(f"{where}: field {field}: empty")
    return tuple(parts)


def _placed(text: str, left: deque[Picture], where: str, field: str) -> tuple[str | Picture, ...]:
    parts: list[str | Picture] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append(_next(left, where, field))
        if piece:
            parts.append(piece)
    return tuple(parts)


def _next(left: deque[Picture], where: str, field: str) -> Picture:
    if not left:
        raise DataError(f"{where}: field {field}: more places for images ({PLACEHOLDER}) than the record has images")
    return left.popleft()


def _check_order(turns: tuple[Turn, ...], where: str, field: str) -> None:
    said = [turn.role for turn in turns]
    spoken = said[1:] if said[0] == "system" else said
    if len(spoken) < 2 or len(spoken) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise DataError(
            f"{where}: field {field}: user and assistant must take turns, the assistant last, after a system message "
            f"or none; found {', '.join(said[:8])}{', …' if len(said) > 8 else ''}"
        )
