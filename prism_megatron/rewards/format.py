"""Whether a response has the form that it has to have, and the answer in it."""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.data.segments import TAGS, parse_lax, parse_response

_OPENS, _CLOSES = f"<{TAGS[-1]}>", f"</{TAGS[-1]}>"


@dataclass(frozen=True)
class ReadResponse:
    """Example: ``ReadResponse(valid=False, answer="3", problem="<caption> appears 0 times")``."""

    valid: bool
    answer: str
    """what stands in the answer's tags; empty where there is not one pair of them"""
    problem: str = ""
    """what is wrong with the form"""


def read_response(response: str, *, ended: bool = True, strict: bool = True) -> ReadResponse:
    """Read a response without its end token; one that was cut off (not ``ended``) is invalid.

    The rules are those of segments (``data/segments.py``): strict, or the released lax ones.
    """
    data = response.encode("utf-8", errors="surrogatepass")
    parsed = parse_response(data) if strict else parse_lax(data)
    if isinstance(parsed, str):
        return ReadResponse(False, _lone_answer(response), parsed)
    if not ended:
        return ReadResponse(False, parsed.answer, "the response does not end in the end token")
    return ReadResponse(True, parsed.answer)


def _lone_answer(response: str) -> str:
    """The answer of a response of another form, where it gives one alone."""
    if response.count(_OPENS) != 1 or response.count(_CLOSES) != 1:
        return ""
    before, _, answer = response.partition(_OPENS)
    return "" if _CLOSES in before else answer.partition(_CLOSES)[0]
