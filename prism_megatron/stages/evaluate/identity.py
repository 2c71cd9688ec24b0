"""What the answers in a folder are of: one that was begun is gone on with by the same model, questions and settings.

Free of torch: the command asks before any process is started.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism_megatron.config.fields import OnResume
from prism_megatron.config.merge import merge, to_plain
from prism_megatron.config.resume import differences
from prism_megatron.config.tools.evaluate import EvaluateConfig
from prism_megatron.disk import write_atomically, writing
from prism_megatron.errors import ConfigError, PrismError, RunStopped
from prism_megatron.evaluation.benchmark.answers import ANSWERS
from prism_megatron.evaluation.benchmark.folder import BEGUN, read_begun
from prism_megatron.run.folder import holds_run

_KEYS = ("config", "model", "questions")
_ELSEWHERE = "begin in another --output"
_PIECE = 2**16


def check_same_asked(config: EvaluateConfig) -> None:
    """Raise ConfigError, in one line, where --output holds a run, or was begun with other flags that count."""
    output = config.output
    if output is None or not output.exists():
        return
    if not output.is_dir() or holds_run(output):
        raise ConfigError(f"--output {output} is a run's folder, or none at all; {_ELSEWHERE}")
    if (begun := read_begun(output, _KEYS)) is None:
        return
    changed = differences(merge(EvaluateConfig(), begun["config"]), config)
    if refused := [one for one in changed if one.on_resume is OnResume.FIXED]:
        flags = [one.flag if one.flag != "--model" else "MODEL" for one in refused]
        raise ConfigError(
            f"{output} was begun otherwise: {'; '.join(map(str, refused))}. Leave {' and '.join(flags)} as before, or "
            f"{_ELSEWHERE}"
        )


def settle(output: Path, config: EvaluateConfig, *, model: dict[str, str], questions: str) -> None:
    """Write down what is asked of whom, or see that it is what was begun; on the main rank.

    Raises ConfigError where it is another.
    """
    now: dict[str, Any] = {"config": to_plain(config), "model": model, "questions": questions}
    begun = read_begun(output, _KEYS)
    if begun is None:
        if _is_answered(output):
            raise ConfigError(f"{output} holds answers and no {BEGUN}: nobody knows whose they are; {_ELSEWHERE}")
        with writing(output / BEGUN):
            write_atomically(output / BEGUN, f"{json.dumps(now, indent=1)}\n")
        return
    if begun["model"] != model:
        raise ConfigError(
            f"{output} was begun with the model {begun['model'].get('name')}, and now MODEL is {model['name']}, or its "
            f"weights were replaced; {_ELSEWHERE}"
        )
    if begun["questions"] != questions:
        raise ConfigError(f"{output} was begun with other questions, answers or images in --data; {_ELSEWHERE}")


@contextmanager
def begun_unless_refused(output: Path) -> Iterator[None]:
    """Inside of it questions are asked. What is refused before anything was answered was not begun, so that it may be
    asked otherwise in the same folder; a kill, and a wish to stop, leave what was begun."""
    try:
        yield
    except RunStopped:
        raise
    except PrismError:
        if not _is_answered(output):
            (output / BEGUN).unlink(missing_ok=True)
        raise


def _is_answered(output: Path) -> bool:
    answers = output / ANSWERS
    return answers.is_file() and answers.stat().st_size > 0


def identity_of(folder: Path) -> dict[str, str]:
    """A model's folder, and a digest by which other weights in it are noticed.

    Of names and sizes of all files, and of the first, middle and last 64 KiB of each: blind to a change elsewhere in a
    large file alone, which no training makes.
    """
    digest = hashlib.sha256()
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}|{size}|".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - _PIECE // 2), max(0, size - _PIECE)}):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return {"name": str(folder), "digest": digest.hexdigest()}
