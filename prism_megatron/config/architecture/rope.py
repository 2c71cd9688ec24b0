"""The rotary positions of a Qwen3-VL's two towers, in all the spellings that transformers reads.

The hub's configs have ``rope_scaling`` with ``rope_theta`` beside it, transformers 5 writes ``rope_parameters`` with
``rope_theta`` inside; the kind is ``rope_type``, or ``type`` in old files. Where spellings stand side by side,
transformers takes one of them (``modeling_rope_utils.RotaryEmbeddingConfigMixin``): here they have to say the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prism_megatron.config.json_section import Section
from prism_megatron.errors import ConfigError

OLD_KIND = "type"
HARMLESS_OLD_KINDS = ("default", "mrope")
"""What old files say under ``type`` of positions that are not scaled; transformers 4 wrote ``mrope``."""
VISION_THETA = 10000.0
"""transformers' only base of the vision tower's angles, where a config names none."""

_SPELLINGS = ("rope_parameters", "rope_scaling")
_VISION_KINDS = ("axial", "default")
_WHOLE_HEAD = (1.0, 1)


@dataclass(frozen=True)
class Rope:
    """``theta`` is the base of the angles; ``mrope_section`` how many pairs of a head turn by time, row and column."""

    theta: float
    mrope_section: tuple[int, int, int]


def text_rope(text: Section) -> Rope:
    """The language tower's. Raises ConfigError for scaled positions, contradictions and whatever is missing."""
    text.expect("partial_rotary_factor", *_WHOLE_HEAD, None)
    spelled = {name: _text_spelling(text, name) for name in _present(text)}
    if not spelled:
        raise ConfigError(
            f"{text.where}: key 'rope_parameters' or 'rope_scaling' is missing; class defaults are not used, so write "
            "it out"
        )
    if len(set(spelled.values())) > 1:
        raise ConfigError(
            f"{text.where}: rope_parameters {spelled['rope_parameters']} and rope_scaling {spelled['rope_scaling']} "
            "are two names of one setting, and differ; remove the wrong one"
        )
    return next(iter(spelled.values()))


def check_vision_rope(vision: Section) -> None:
    """Raise ConfigError for any other angles of the vision tower than its 10000 over whole heads."""
    vision.expect("partial_rotary_factor", *_WHOLE_HEAD, None)
    vision.expect("rope_theta", VISION_THETA, None)
    for name in _present(vision):
        rope = _one(vision, name)
        _check_kind(rope, _VISION_KINDS)
        rope.expect("rope_theta", VISION_THETA)
        _refuse_others(rope)


def _present(section: Section) -> list[str]:
    """The spellings that say anything; transformers takes an empty object for none."""
    section.read.update(_SPELLINGS)
    return [name for name in _SPELLINGS if section.values.get(name) not in (None, {})]


def _one(section: Section, name: str) -> Section:
    rope = section.section(name)
    rope.expect("partial_rotary_factor", *_WHOLE_HEAD)
    return rope


def _text_spelling(text: Section, name: str) -> Rope:
    rope = _one(text, name)
    _check_kind(rope, ("default",))
    rope.expect("mrope_interleaved", True)
    inside, beside = rope.get("rope_theta"), text.get("rope_theta")
    if inside is not None and beside is not None and inside != beside:
        raise ConfigError(
            f"{rope.where}: rope_theta is {inside!r}, but {beside!r} beside it; they are two names of one setting, so "
            "remove the wrong one"
        )
    theta = rope.number("rope_theta") if "rope_theta" in rope.values else text.number("rope_theta")
    if not theta > 0:
        raise ConfigError(f"{rope.where}: rope_theta is {theta}, expected a positive number")
    section = rope.integers("mrope_section")
    _refuse_others(rope)
    if len(section) != 3 or sum(section) * 2 != text.size("head_dim"):
        raise ConfigError(
            f"{rope.where}: mrope_section {list(section)} must be three counts that add up to half of "
            f"head_dim {text.size('head_dim')}"
        )
    return Rope(theta, (section[0], section[1], section[2]))


def _check_kind(rope: Section, kinds: tuple[str, ...]) -> None:
    """Both names of the kind; transformers reads the old one only where the new one is absent."""
    rope.expect("rope_type", *kinds)
    rope.expect(OLD_KIND, *kinds, *HARMLESS_OLD_KINDS)


def _refuse_others(rope: Section) -> None:
    """Keys that are left belong to scaled positions, or to layers of several kinds."""
    if others := sorted(rope.values.keys() - rope.read):
        raise ConfigError(f"{rope.where}: {others[0]} does not belong to default positions; remove it")


def in_new_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed ``config.json`` with ``rope_type`` in place of the old key: transformers 5 takes no ``mrope`` there.

    Only what ``text_rope`` and ``check_vision_rope`` accept is put in other words.
    """
    made = copy.deepcopy(dict(config))
    for part in (made.get("text_config"), made.get("vision_config")):
        for name in _SPELLINGS:
            rope = part.get(name) if isinstance(part, dict) else None
            if isinstance(rope, dict) and rope.get(OLD_KIND) in HARMLESS_OLD_KINDS:
                rope.setdefault("rope_type", HARMLESS_OLD_KINDS[0])
                del rope[OLD_KIND]
    return made
