"""Writes the pairs of a run as ``data/pairs.py`` reads them: one part a step, one file at the end."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.disk import write_atomically
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.types import PreferenceGroup

IMAGES = "images"


def check_new_file(path: Path) -> None:
    """Raise ConfigError for a file that is there already."""
    if path.exists():
        raise ConfigError(f"--write-pairs {path} exists; remove it, or give another file")


class PairWriter:
    """For the main rank. A killed run goes on with ``fresh=False`` and ends in the file of an uninterrupted one."""

    def __init__(self, path: Path, renderer: Renderer, *, fresh: bool) -> None:
        """Raises ConfigError for a file that is there already."""
        check_new_file(path)
        self._path = path
        self._parts = path.with_name(f".{path.name}.parts")
        self._renderer = renderer
        if fresh and self._parts.exists():
            shutil.rmtree(self._parts)
        self._parts.mkdir(parents=True, exist_ok=True)
        (path.parent / IMAGES).mkdir(exist_ok=True)

    def write(self, step: int, examples: Sequence[Example], groups: Sequence[PreferenceGroup]) -> int:
        """Put one step's pairs on disk; how many there are. Answers that no text stands for are left out.

        Those are invalid responses, and such as hold bytes that are no UTF-8 or added tokens inside a body.
        """
        lines: list[str] = []
        pairs = 0
        for example, group in zip(examples, groups, strict=True):
            texts = [self._text(group, r) for r in group.valid_rollouts]
            rejected = [text for text in texts if text is not None]
            if rejected:
                lines.append(json.dumps(self._line(example, group, rejected), ensure_ascii=False) + "\n")
                pairs += len(rejected)
        write_atomically(self._part(step), "".join(lines))
        return pairs

    def close(self, steps: int) -> None:
        """Join the parts of all ``steps`` to the file. Raises DataError if one is missing."""
        parts = [self._part(step) for step in range(steps)]
        for step, part in enumerate(parts):
            if not part.is_file():
                raise DataError(f"{part} is missing: --write-pairs was not given in step {step + 1} of this run")
        write_atomically(self._path, "".join(part.read_text(encoding="utf-8") for part in parts))
        shutil.rmtree(self._parts)

    def _part(self, step: int) -> Path:
        return self._parts / f"{step:06d}.jsonl"

    def _text(self, group: PreferenceGroup, r: int) -> str | None:
        text = self._renderer.decode(group.rollouts[r].token_ids[:-1])
        try:
            self._renderer.written(text, id=group.prompt.id)
        except DataError:  # it could not be read again
            return None
        return None if "\ufffd" in text else text

    def _line(self, example: Example, group: PreferenceGroup, rejected: Sequence[str]) -> dict[str, object]:
        return {
            "id": group.prompt.id,
            "image": self._image(example),
            "question": group.prompt.question,
            "chosen": self._renderer.decode(group.reference.token_ids[:-1]),
            "rejected": list(rejected),
            "source": "scenes" if example.record is None else example.record.source,
        }

    def _image(self, example: Example) -> str:
        """The image's file below the folder, named by its content, so that one picture is one file."""
        if example.record is not None:
            data, suffix = example.record.image.read_bytes(), example.record.image.suffix
        else:
            assert example.scene is not None, "an example comes from a scene or from a record"
            buffer = io.BytesIO()
            example.scene.image().save(buffer, format="PNG")
            data, suffix = buffer.getvalue(), ".png"
        name = f"{IMAGES}/{hashlib.blake2b(data, digest_size=16).hexdigest()}{suffix}"
        target = self._path.parent / name
        if not target.exists():
            aside = target.with_name(f".{target.name}.part")
            aside.write_bytes(data)
            aside.replace(target)
        return name
