"""The texts that models are asked with, each with a version: a prompt is known by what it says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

Name = Literal["teacher", "teacher_told", "strong", "disambiguate", "judge"]
NAMES: tuple[Name, ...] = get_args(Name)
_PLACE = re.compile(r"\{\{([A-Z]+)\}\}")
_VERSION_DIGITS = 12


@dataclass(frozen=True)
class Template:
    """Text with places such as ``{{QUESTION}}``.

    Example: ``template("strong").filled(QUESTION="How many circles are there?")``.
    """

    text: str

    @property
    def version(self) -> str:
        """The first 12 hexadecimal digits of the text's hash."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:_VERSION_DIGITS]

    def filled(self, **values: str) -> str:
        """The text with every place taken by its value, in which nothing is a place any more."""
        return _PLACE.sub(lambda found: values[found[1]], self.text)


@lru_cache
def template(name: Name) -> Template:
    """The one of that name, ``NAME.txt`` beside this file."""
    return Template((Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n"))


def versions() -> Mapping[str, str]:
    """Of all templates by their names."""
    return {name: template(name).version for name in NAMES}


def as_data(value: Any) -> str:
    """What others wrote, as JSON in which nothing is a tag: ``<`` and ``>`` are escapes inside its texts."""
    return json.dumps(value, indent=1).replace("<", "\\u003c").replace(">", "\\u003e")
