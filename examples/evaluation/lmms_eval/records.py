"""What ``records.yaml`` asks of lmms-eval: the question as training puts it, and verdicts on what stands in the tags.

It runs in lmms-eval's environment and needs nothing of ours. Its verdicts are simpler than those of ``prism-evaluate``:
the answer must be the right one but for case and white space, of a choice its letter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

FAILED = "[LMMS_EVAL_REQUEST_FAILED"
"""How the answer begins that lmms-eval puts in where a request got none."""
TAGS = ("caption", "think", "answer")


def pictures(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The record's image, upright and white where it is transparent; it is sent as a PNG, which loses nothing."""
    with Image.open(Path(doc["image"])) as file:
        image = ImageOps.exif_transpose(file)
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
    right = _plain(_answer(said)) == _plain(doc["answer"])
    return {
        "right": float(right and _is_in_form(said)),
        "right_in_any_form": float(right),
        "failed": float(said.startswith(FAILED)),
    }


def _answer(said: str) -> str:
    """What the first answer's tags hold; nothing where they close before they open."""
    before, _, after = said.partition("<answer>")
    return "" if "</answer>" in before else after.partition("</answer>")[0]


def _is_in_form(said: str) -> bool:
    """One of each tag, in order, none empty, nothing outside."""
    if any(said.count(tag) != 1 for name in TAGS for tag in (f"<{name}>", f"</{name}>")):
        return False
    for name in TAGS:
        before, _, after = said.partition(f"<{name}>")
        body, closes, said = after.partition(f"</{name}>")
        if before.strip() or not body.strip() or not closes:
            return False
    return not said.strip()


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
