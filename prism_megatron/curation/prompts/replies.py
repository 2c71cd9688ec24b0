"""What a model replied, read strictly. All of it is hostile text; every rule is linear in its length."""

from __future__ import annotations

import re

_CHOICE = re.compile(r"<choice>\s{0,8}([0-9]{1,4})\s{0,8}</choice>")
_VERDICT = re.compile(r"<verdict>\s{0,8}(right|wrong)\s{0,8}</verdict>")
_ANSWER_OPENS, _ANSWER_CLOSES = "<answer>", "</answer>"


def final_answer(reply: str) -> str:
    """What stands in the last pair of answer tags; empty where there is none."""
    before, opens, rest = reply.rpartition(_ANSWER_OPENS)
    answer, closes, _ = rest.partition(_ANSWER_CLOSES)
    del before
    return answer.strip() if opens and closes else ""


def verdict_of(reply: str) -> bool | None:
    """Whether the judge says right; None for a reply that has no verdict, or more than one of its tags."""
    found = _only(_VERDICT, reply, "verdict")
    return None if found is None else found == "right"


def choice_of(reply: str, *, most: int) -> int | None:
    """The number that was chosen, from 0 to ``most``; None for a reply without one, or with more than one."""
    found = _only(_CHOICE, reply, "choice")
    return None if found is None or int(found) > most else int(found)


def _only(pattern: re.Pattern[str], reply: str, tag: str) -> str | None:
    """What ``pattern`` finds, where the tag is opened once and closed once."""
    if reply.count(f"<{tag}>") != 1 or reply.count(f"</{tag}>") != 1:
        return None
    found = pattern.search(reply)
    return None if found is None else found[1]
