"""How many tokens a call may take, and what an answer cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prism_megatron.config.tools.curate import Endpoint

_CHARACTERS_A_TOKEN = 4
_TOKENS_AN_IMAGE = 1000
_MILLION = 1e6


@dataclass(frozen=True)
class Tokens:
    """Of a prompt, and of its answer."""

    prompt: int
    answer: int

    @property
    def all(self) -> int:
        return self.prompt + self.answer


def estimate(body: Mapping[str, Any]) -> Tokens:
    """What a request takes at most, about: a quarter of its characters, a thousand an image, and the longest answer."""
    prompt = 0
    for message in body.get("messages", ()):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            prompt += in_text(part["text"]) if part["type"] == "text" else _TOKENS_AN_IMAGE
    return Tokens(prompt, int(body.get("max_tokens") or body.get("max_completion_tokens") or 0))


def in_text(text: str) -> int:
    """Tokens of a text, about."""
    return -(-len(text) // _CHARACTERS_A_TOKEN)


def cost(tokens: Tokens, endpoint: Endpoint) -> float:
    """In the unit of the endpoint's prices."""
    return (tokens.prompt * endpoint.price_in + tokens.answer * endpoint.price_out) / _MILLION
