"""What the files in a folder are of: one that was begun is gone on with by the same recipe, prompts and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_megatron.config.json_file import read_object
from prism_megatron.config.merge import to_plain
from prism_megatron.config.tools.curate import CurateConfig, Recipe, without_endpoints
from prism_megatron.curation.prompts.templates import versions
from prism_megatron.disk import write_atomically, writing
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.run.folder import holds_run

BEGUN = "curation.json"
STORE = "store.sqlite"
_SHOWN = 60


def identity_of(config: CurateConfig, recipe: Recipe, *, data: str, evaluation: str) -> dict[str, Any]:
    """All that decides what comes out, plain; ``data`` and ``evaluation`` are digests.

    Where models are served, how patiently they are asked and how many processes check is not in it.
    """
    about = {
        "recipe": to_plain(without_endpoints(recipe)),
        "limit": config.limit,
        "check_seconds": config.check_seconds,
        "prompts": versions(),
        "data": data,
        "evaluation": evaluation,
    }
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def check_output(output: Path | None) -> None:
    """Raise ConfigError where --output is no folder of a curation, nor of nothing."""
    if output is None or not output.exists():
        return
    if not output.is_dir() or holds_run(output):
        raise ConfigError(f"--output {output} is a run's folder, or none at all; give another one")


def settle(output: Path, now: Mapping[str, Any]) -> None:
    """Write down what is curated, or see that it is what was begun. Raises ConfigError where it is another.

    A changed recipe is refused as a whole, also where steps before the change would be the same: stored answers make
    doing them again cheap.
    """
    path = output / BEGUN
    if not path.exists():
        if any(output.glob("*-*.jsonl")):
            raise ConfigError(
                f"{output} holds steps and no {BEGUN}: nobody knows what they are of; give another --output"
            )
        with writing(path):
            write_atomically(path, f"{json.dumps(now, indent=1)}\n")
        return
    changed = differences(read_object(path, error=DataError), now)
    if changed:
        raise ConfigError(
            f"{output} was begun otherwise: {'; '.join(changed)}. Leave that as before, or begin in another --output; "
            f"with --store {output / STORE} (or the --store of before) what was answered is not asked again"
        )


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two plain values, a line each, such as ``recipe.best was 100 and is 200``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for place, (one, other) in enumerate(zip(before, now, strict=True))
            for line in differences(one, other, f"{name}[{place}]")
        ]
    return [] if before == now else [f"{name} was {_shown(before)} and is {_shown(now)}"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
