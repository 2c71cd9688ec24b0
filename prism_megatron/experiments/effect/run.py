"""A whole registration: its seeds, several at a time, and what they came to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prism_megatron.config.experiments.effect import EffectConfig, Registration
from prism_megatron.config.json_file import read_object
from prism_megatron.config.merge import to_plain
from prism_megatron.disk import write_atomically, writing
from prism_megatron.errors import ConfigError, PrismError
from prism_megatron.evaluation.drift.compare import Embed
from prism_megatron.experiments.effect.answers import Answers, read_answers
from prism_megatron.experiments.effect.archive import archive_of, is_whole, pack, unpack
from prism_megatron.experiments.effect.drift import drift_of, lines_of
from prism_megatron.experiments.effect.seed import arms_of, folder_of, is_done, read_done
from prism_megatron.experiments.effect.table import document_of, text_of

PARENT = "PRISM_EFFECT_PARENT"
"""Set for the process of a seed: the command that it must not outlive."""
_REGISTERED = "registered.json"
RESULT, RESULT_TEXT = "effect.json", "effect.md"


def settle(output: Path, registered: Registration) -> None:
    """Write down what the folder is of. Raises ConfigError where it is of another registration, DiskError."""
    path, now = output / _REGISTERED, json.loads(json.dumps(to_plain(registered)))
    if path.exists():
        if read_object(path, error=ConfigError) != now:
            raise ConfigError(f"{output} holds the runs of another registration; name another --output")
        return
    with writing(path):
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(now, indent=1) + "\n")


def run_seeds(config: EffectConfig, registered: Registration, command: Sequence[str]) -> None:
    """Run every seed by ``command --seed N``, so many at a time, but for those that are in the archive.

    Raises PrismError where one of them failed.
    """
    if config.archive is not None:
        for seed in registered.seeds:
            kept = archive_of(config.archive, seed)
            if kept.exists() and not is_whole(config.output, registered, seed):
                unpack(kept, config.output, registered, seed)

    def run(seed: int) -> int:
        status = 0
        if not is_whole(config.output, registered, seed):
            environment = {**os.environ, PARENT: str(os.getpid())}
            status = subprocess.run([*command, "--seed", str(seed)], check=False, env=environment).returncode
        if config.archive is not None and not status and not archive_of(config.archive, seed).exists():
            pack(config.output, registered, seed, archive_of(config.archive, seed))
        return status

    with ThreadPoolExecutor(config.workers) as workers:
        statuses = dict(zip(registered.seeds, workers.map(run, registered.seeds), strict=True))
    if failed := [seed for seed, status in statuses.items() if status]:
        raise PrismError(
            f"of {len(statuses)} seeds {', '.join(map(str, failed))} did not end; the same command goes on with them"
        )


def commit_here() -> str:
    """The commit of the code, with a mark where the checkout has other text than that; a release's is unknown."""
    root = Path(__file__).resolve().parents[3]

    def git(*words: str) -> str:
        found = subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True)
        return found.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_result(output: Path, registered: Registration, embed: Embed | None = None, *, workers: int = 1) -> str:
    """Write ``effect.json`` and ``effect.md`` of all seeds; the text. Raises PrismError where an arm is missing."""
    runs: dict[str, dict[int, Answers]] = {}
    done: dict[str, dict[int, Mapping[str, object]]] = {}
    for place, seed in enumerate(registered.seeds):
        for arm in arms_of(registered, place):
            folder = folder_of(output, seed, arm)
            if not is_done(folder):
                raise PrismError(f"{folder} is not done; the same command without --seed runs it")
            runs.setdefault(arm, {})[seed] = read_answers(folder)
            done.setdefault(arm, {})[seed] = read_done(folder)
    drift = drift_of(output, registered, embed, workers=workers)
    document = document_of(registered, runs, done) | {"drift": drift}
    text = "\n".join(
        [
            text_of(registered, document),
            "## Drift of answers at temperature 1",
            "",
            "Means over seeds (docs/drift.md): Wasserstein-1 of caption items and reasoning steps, MMD² of words.",
            "",
            *lines_of(drift),
        ]
    )
    with writing(output / RESULT):
        write_atomically(output / RESULT, json.dumps(document, indent=1) + "\n")
        write_atomically(output / RESULT_TEXT, text + "\n")
    return text


def command_of(config: EffectConfig, script: Path) -> list[str]:
    """The command line of the same experiment, to which a seed is added."""
    named = [] if config.registration is None else ["--registration", str(config.registration)]
    return [sys.executable, str(script), *named, "--output", str(config.output)]
