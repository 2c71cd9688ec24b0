"""Is a reply whole, and in the asked form? All rules are stated here, and linear in the reply's length.

A reply that fails is asked for again; whether its answer is right is another question (``correct.py``).
"""

from __future__ import annotations

import re

from prism_megatron.curation.calls import Response
from prism_megatron.data.segments import TaggedText, parse_response

Failure = tuple[str, str]
"""The reason, out of REASONS, and which case of it."""
UNANSWERED, REFUSED, OVERSIZED = "unanswered", "refused", "oversized"
TRUNCATED, CUT_SHORT, EMPTY = "truncated", "ended for another reason", "empty"
FORMAT, CONTROL, LANGUAGE, REPEATS, TOLD = (
    "format",
    "control tokens",
    "another script",
    "repeats itself",
    "says it was told",
)
WHOLE_REASONS = (UNANSWERED, REFUSED, OVERSIZED, TRUNCATED, CUT_SHORT, EMPTY)
FORM_REASONS = (FORMAT, CONTROL, LANGUAGE, REPEATS, TOLD)

_SHOWN = 200
_CONTROL = re.compile(r"<\|[^<>|\s]{1,60}\|>|</?tool_(?:call|response)>")
"""Added tokens of Qwen's tokenizers and their like, which training refuses in any text."""
# Letters but those of Latin and Greek, which formulas have, and of signs that are made of them.
_LETTER = re.compile(r"[^\W\d_]")
_OTHER_LETTER = re.compile(
    r"[^\W\d_\u0000-\u03ff\u1d00-\u1dbf\u1e00-\u1fff\u2070-\u218f\u2c60-\u2c7f\ua720-\ua7ff\uab30-\uab6f"
    r"\ufb00-\ufb06\uff21-\uff5a\U0001d400-\U0001d7ff]"
)
_MOST_OTHER = 0.2
_WINDOW, _FEWEST_WORDS = 8, 30
_RUN = re.compile(r"(\S)\1{199}", re.DOTALL)
_RIGHT = r"(?:right |correct |final )?"
_TOLD = re.compile(
    r"ground[\s-]{1,3}truth"
    rf"|\b(?:given|provided|supplied|stated|known|reference|expected)\s{{1,3}}{_RIGHT}(?:answer|solution)\b"
    r"|\banswer\s{1,3}key\b"
    r"|\banswer\s{1,3}(?:that\s{1,3})?(?:i|we)\s{1,3}(?:was|were|am|are)\s{1,3}(?:given|told|provided)\b"
    r"|\b(?:i|we)\s{1,3}(?:was|were|am|are|have been)\s{1,3}(?:given|told)\s{1,3}(?:that\s{1,3})?the\s{1,3}"
    rf"{_RIGHT}answer\b"
    rf"|\bthe\s{{1,3}}{_RIGHT}answer\s{{1,3}}(?:is|was)\s{{1,3}}(?:given|provided)\b(?!\s{{1,3}}by)",
    re.IGNORECASE,
)
"""How a teacher says that it was told: "by the given answer" does, "the answer is given by" does not."""


def not_whole(response: Response) -> Failure | None:
    """Why there is no whole reply; None where there is one."""
    if not response.answered:
        return response.kind, response.text[:_SHOWN]
    if response.finish == "length":
        return TRUNCATED, f"{response.answer_tokens} tokens"
    if response.finish != "stop":
        return CUT_SHORT, response.finish[:_SHOWN]
    return None if response.text.strip() else (EMPTY, "")


def bodies_of(reply: str, *, asked: str, right: str, told: bool) -> TaggedText | Failure:
    """The three parts of a whole reply, or why it has not the asked form.

    ``asked`` and ``right`` are the question and its answer, whose own script counts; ``told`` whether the teacher was
    told the answer.
    """
    try:
        parsed = parse_response(reply.encode("utf-8"))
    except UnicodeEncodeError:
        return FORMAT, "half of a surrogate pair, which is no text"
    if isinstance(parsed, str):
        return FORMAT, parsed
    if (found := control_token(reply)) is not None:
        return CONTROL, found
    bodies = {"caption": parsed.caption, "think": parsed.think, "answer": parsed.answer}
    for name, body in bodies.items():
        if in_another_script(body, asked + right):
            return LANGUAGE, name
    for name, body in bodies.items():
        if repeats_itself(body):
            return REPEATS, name
    if told and (mention := _TOLD.search(f"{parsed.caption}\n{parsed.think}")) is not None:
        return TOLD, mention[0]
    return parsed


def control_token(text: str) -> str | None:
    """The first control token that the text spells out, such as ``<|im_start|>``."""
    found = _CONTROL.search(text)
    return None if found is None else found[0]


def in_another_script(body: str, asked: str) -> bool:
    """Whether more than a fifth of its letters are neither Latin nor Greek, where ``asked`` has no such letter."""
    if body.isascii() or _OTHER_LETTER.search(asked) is not None:
        return False
    others = len(_OTHER_LETTER.findall(body))
    return others > _MOST_OTHER * len(_LETTER.findall(body))


def repeats_itself(body: str) -> bool:
    """Whether fewer than half of its runs of 8 words are different ones, in 30 words or more, or one character stands
    200 times in a row."""
    if _RUN.search(body) is not None:
        return True
    words = body.split()
    if len(words) < _FEWEST_WORDS:
        return False
    runs = len(words) - _WINDOW + 1
    return 2 * len({tuple(words[start : start + _WINDOW]) for start in range(runs)}) < runs
