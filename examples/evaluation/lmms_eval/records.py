"""What ``records.yaml`` asks of lmms-eval: the question as training puts it, and verdicts on what stands in the tags.

It runs in lmms-eval's environment and needs nothing of ours. Its verdicts are simpler than those of ``prism-evaluate``:
the answer must be the right one but for case and white space, or, of a choice, its letter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

FAILED = "[LMMS_EVAL_REQUEST_FAILED"
"""How the answer begins that lmms-eval puts in where a request got none."""
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_WHOLE = re.compile(
    r"\s*<caption>(?=.*?\S.*?</caption>).*?</caption>\s*<think>(?=.*?\S.*?</think>).*?</think>\s*<answer>.*?</answer>\s*",
    re.DOTALL,
)


def pictures(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The record's image, white where it is transparent; lmms-eval sends it as a PNG, which loses nothing."""
    with Image.open(Path(doc["image"])) as image:
        if not image.has_transparency_data:
            return [image.convert("RGB")]
        seen = image.convert("RGBA")
    return [Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")]


def question(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The question, choices as lettered lines below it."""
    del lmms_eval_specific_kwargs
    choices = doc.get("choices") or []
    return "\n".join([doc["question"], *(f"{chr(65 + at)}. {choice}" for at, choice in enumerate(choices))])


def verdicts(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Of the one answer: right in the asked form, right in any form, and whether the request failed."""
    (said,) = results
    found = _ANSWER.findall(said)
    right = bool(found) and _is_right(found[-1], doc)
    # One of each tag: a body that holds another tag would match the pattern of the whole.
    in_form = _WHOLE.fullmatch(said) is not None and all(
        said.count(tag) == 1 for tag in ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")
    )
    return {
        "right": float(right and in_form),
        "right_in_any_form": float(right),
        "failed": float(said.startswith(FAILED)),
    }


def _is_right(said: str, doc: Mapping[str, Any]) -> bool:
    return _plain(said) == _plain(doc["answer"])


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
