"""Is a finished step still the one that is asked for? By its tool, its settings and what it reads.

Settings that change nothing that is trained, such as the layout, do not count (``config/fields.py``, ``OnResume``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config.fields import Field, OnResume, fields_of
from prism_megatron.conversion.checkpoints.model_names import folder_of
from prism_megatron.errors import ConfigError
from prism_megatron.pipeline.plan import Step
from prism_megatron.pipeline.tools import value_at
from prism_megatron.stages.evaluate.identity import identity_of

_TEXT = (".jsonl", ".json", ".csv", ".tsv", ".txt")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_PIECE = 2**20


@dataclass(frozen=True)
class Identity:
    """Two steps of the same ``work`` compute the same; of the same ``result`` they give the same too."""

    work: str
    result: str


def identities(steps: Sequence[Step], known: Mapping[str, Identity]) -> dict[str, Identity]:
    """Of every step by its key, those that are ``known`` as they are.

    Raises ConfigError for data that cannot be read, PrismError for a model that is not there.
    """
    found: dict[str, Identity] = {}
    for step in steps:
        found[step.key] = known[step.key] if step.key in known else _identity(step, found)
    return found


def _identity(step: Step, found: Mapping[str, Identity]) -> Identity:
    trained = [field for field in fields_of(step.config) if field.on_resume not in (OnResume.FREE, OnResume.COMMAND)]
    work = _hash([step.tool.name, [[field.flag, _value(step, field, found)] for field in trained]])
    counted = {field.path for field in trained}
    others = [[way, found[key].result] for way, key in step.uses.items() if way not in counted]
    chosen = [[way, value_at(step.config, way)] for way in step.tool.chosen_by]
    return Identity(work, _hash([work, others, chosen]))


def _value(step: Step, field: Field, found: Mapping[str, Identity]) -> Any:
    """What counts of a field: of what lies in a file or a folder not its name but what is in there."""
    value = field.value
    if field.path in step.uses:
        return {"of": found[step.uses[field.path]].result}
    kind = step.tool.inputs.get(field.path)
    if kind == "policy" and value is None and step.tool.mini_policy is not None:
        return {"model": identity_of(step.tool.mini_policy(step.config))["digest"]}
    if kind in ("policy", "discriminator") and value is not None:
        return {"model": identity_of(folder_of(value, kind, flag=field.flag))["digest"]}
    if isinstance(value, Path):
        return {"data": digest_of_data(value)}
    if isinstance(value, tuple):
        return [{"data": digest_of_data(one)} if isinstance(one, Path) else one for one in value]
    return value


def digest_of_data(place: Path) -> str:
    """Of a file, or of all files below a folder: names and sizes, and of text the whole content.

    Blind to a picture that another one of the same size in bytes takes the place of; of other files, such as shards,
    the first, middle and last 64 KiB count. Raises ConfigError for what cannot be read.
    """
    try:
        if not place.is_dir():
            return _digest_of_file(place)
        digests = [
            [str(path.relative_to(place)), _digest_of_file(path)]
            for path in sorted(one for one in place.rglob("*") if one.is_file())
        ]
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror or error}") from error
    return _hash(digests)


def _digest_of_file(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(f"{size}|".encode())
    if path.suffix.lower() in _PICTURES:
        return digest.hexdigest()
    with path.open("rb") as file:
        if path.suffix.lower() in _TEXT:
            while piece := file.read(_PIECE):
                digest.update(piece)
        else:
            part = 2**16
            for start in sorted({0, max(0, size // 2 - part // 2), max(0, size - part)}):
                file.seek(start)
                digest.update(file.read(part))
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
