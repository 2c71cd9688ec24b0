"""Thousands of damaged files of settings through the ``--config`` of every command, which reads each or says why not.

``python -m tests.fuzz_yaml --files 2000`` prints what came of them; a sample runs with the other tests.
"""

from __future__ import annotations

import argparse
import gc
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from prism_megatron.commands import align, convert, pipeline, warm_start
from prism_megatron.config.cli import parse_over
from prism_megatron.config.experiments.effect import EffectConfig
from prism_megatron.config.experiments.mini_world import MakeMiniConfig
from prism_megatron.config.experiments.variants import VariantsConfig
from prism_megatron.config.merge import to_yaml
from prism_megatron.config.pipeline.file import EVALUATE, read_pipeline
from prism_megatron.config.pipeline.flags import BUILT_IN, PipelineConfig
from prism_megatron.config.tools.report import ReportConfig
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.config.tools.verify import VerifyConfig
from prism_megatron.errors import PrismError
from prism_megatron.pipeline.references import check_references

HANG_SECONDS = 20
"""Of CPU time: the machine may be busy."""
Door = Callable[[Sequence[str]], Any]

OTHERS = {
    **{f"convert {name}": defaults for name, (defaults, _) in convert.COMMANDS.items()},
    "serve": ServeConfig(),
    "verify": VerifyConfig(),
    "report": ReportConfig(),
    "effect": EffectConfig(output=Path("out")),
    "variants": VariantsConfig(output=Path("out")),
    "make-mini": MakeMiniConfig(output=Path("out")),
}


def read_stages(argv: Sequence[str]) -> PipelineConfig:
    """The file of a pipeline as far as no tool parses its sections: of those keys, types and names are read."""
    tools = pipeline.tools_of_users()
    check_references(read_pipeline(Path(argv[1]), tools=[name for name in tools if name != EVALUATE]), tools)
    return PipelineConfig()


DOORS: dict[str, tuple[Any, Door]] = {
    "align": (align.parse([]), align.parse),
    "warm-start": (warm_start.parse([]), warm_start.parse),
    **{name: (defaults, partial(parse_over, defaults, description="")) for name, defaults in OTHERS.items()},
    "pipeline": (BUILT_IN.read_text(encoding="utf-8"), read_stages),
}
"""By command: the settings that are damaged, or their text, and what reads them."""

SCALARS = (
    "yes", "no", "on", "off", "~", "null", "None", ".nan", ".inf", "-.inf", "nan", "inf", "1:30", "190:20:30", "010",
    "0o10", "0x10", "0b1", "1_000", "1e3", "1e999", "-1", "0", "2001-12-14", "2001-99-99",
    "2001-12-14t21:59:43.10-05:00", "9" * 400, "9" * 5000, "0x" + "f" * 6000, '"\\0"', '"\\ud800"', '"\\U00110000"',
    '"\\x07"', "'", '"', "[]", "{}", "[1, [2, [3]]]", "{a: {b: {c: d}}}", "!!int abc", "!!int ''", "!!bool maybe",
    "!!float x", "!!binary aGk=", "!!binary ?", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!timestamp x",
    "!!null x", "!!map []", "!!seq {}", "!!str 3", "!foo bar", "!!python/object/apply:os.system [true]",
    "!!python/name:os.system", "*none", "&a", "&a *a", "&a [*a]", "&a {b: *a}", "&a {<<: *a}", "{<<: 3}",
    "{<<: [{steps: 1}, {steps: 2}]}", "=", "<<", "|", ">", "|\n  text", "%", "@", "`", "?", "? a", "- 1", "[" * 2000,
    "{a: " * 2000, "[" * 500 + "]" * 500, "é", "\N{GRINNING FACE}", "\ufeff", "\x85", "\u2028", "\t", "x" * 5000,
    "# comment", "'it''s'", "--- 1", "...", "{? [a]: 1}", "{1: 2}", "{null: 1}", "{a: 1, a: 2}",
)  # fmt: skip
BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])


@dataclass
class Outcome:
    """What came of the files."""

    kinds: Counter[str] = field(default_factory=Counter)
    """read, or the name of the error"""
    failures: list[str] = field(default_factory=list)
    """tracebacks, messages of several lines or without a file, and hangs"""
    slowest: float = 0.0
    """seconds of CPU time"""
    grown_bytes: int = 0
    """resident memory after the last file above that after the first fifth"""


def damaged(text: str, rng: random.Random) -> bytes:
    """One damaged form of a file of settings."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        text = rng.choice(_DAMAGES)(text, rng)
    data = text.encode("utf-8", "surrogatepass")
    how = rng.randrange(14)
    if how == 0:
        encoding = rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "cp037"))
        data = text.encode(encoding, "replace")
    elif how == 1 and data:
        place = rng.randrange(len(data))
        data = data[:place] + bytes([rng.randrange(256)]) + data[place + rng.randrange(2) :]
    elif how == 2:
        data = data[: rng.randrange(len(data) + 1)]
    return data


def _value(text: str, rng: random.Random) -> str:
    """Another value behind a key."""
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    if colon:
        lines[place] = f"{key}: {rng.choice(SCALARS)}"
    return "\n".join(lines)


def _key(text: str, rng: random.Random) -> str:
    """Another key before a value."""
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    key, colon, value = lines[place].partition(":")
    indent = key[: len(key) - len(key.lstrip())]
    if colon:
        lines[place] = f"{indent}{rng.choice((*SCALARS, key.strip().upper(), key.strip()[1:]))}:{value}"
    return "\n".join(lines)


def _twice(text: str, rng: random.Random) -> str:
    """A line that stands twice."""
    lines = text.split("\n")
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return "\n".join(lines)


def _indent(text: str, rng: random.Random) -> str:
    """A line that stands elsewhere across."""
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    lines[place] = rng.choice(("\t", " ", "   ", "- ", "? ", "& ", "")) + lines[place].lstrip(rng.choice((" ", "")))
    return "\n".join(lines)


def _inserted(text: str, rng: random.Random) -> str:
    """A piece of YAML anywhere."""
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice(SCALARS) + text[place:]


def _removed(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + text[place + rng.randrange(1, 40) :]


def _other(text: str, rng: random.Random) -> str:
    """Another file altogether."""
    return rng.choice(
        (
            "", "\n", "- a\n- b", "3", "text", "a: 1\n---\nb: 2", BOMB, f"{BOMB}\nsteps: *a11", "a: &a {b: *a}",
            text * 2,
            f"policy: &p {{lr: 1e-4}}\ndiscriminator_optimizer: {{<<: *p, lr: 2e-4}}\n{text[:40]}", "\0" * 50,
            "[" * 100_000, "{" * 100_000, "? " * 5_000, "- " * 5_000, "a: " * 3_000,
            "\n".join(f"k{n}: {n}" for n in range(12_000)),
            "x" * 300_000, "".join(rng.choice(":-?[]{}&*!|>'\"%@`#, \n\tab01") for _ in range(200)),
        )
    )  # fmt: skip


_DAMAGES = (_value, _value, _value, _value, _key, _twice, _indent, _inserted, _removed, _other)


def try_files(count: int, *, seed: int, folder: Path) -> Outcome:
    """Read ``count`` damaged files, each through one command's door, in turn."""
    outcome, rng, names = Outcome(), random.Random(seed), list(DOORS)
    process = psutil.Process()
    early = 0
    for number in range(count):
        defaults, door = DOORS[names[number % len(names)]]
        path = folder / "settings.yaml"
        path.write_bytes(damaged(defaults if isinstance(defaults, str) else to_yaml(defaults), rng))
        began = time.process_time()
        kind, failure = _tried(door, path)
        outcome.slowest = max(outcome.slowest, time.process_time() - began)
        outcome.kinds[kind] += 1
        if failure:
            start = path.read_bytes()[:300]
            outcome.failures.append(f"file {number} of {names[number % len(names)]}: {failure}\n{start!r}")
        if number == count // 5:
            gc.collect()
            early = process.memory_info().rss
    gc.collect()
    outcome.grown_bytes = process.memory_info().rss - early
    return outcome


def _tried(door: Door, path: Path) -> tuple[str, str]:
    """What came of one file, and what is wrong with that."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not read in {HANG_SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        # What is read is printed and saved by a run.
        to_yaml(door(["--config", str(path)])).encode("utf-8")
    except PrismError as error:
        message = str(error)
        if "\n" in message or len(message) > 1500:
            return "bad message", f"a message of several lines, or a long one: {message[:300]!r}"
        return type(error).__name__, ""
    except (Exception, SystemExit):  # noqa: BLE001  # whatever else a reader raises is what is looked for
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return "read", ""


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every file was read or refused in one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-yaml-") as folder:
        outcome = try_files(options.files, seed=options.seed, folder=Path(folder))
    print("\n\n".join(outcome.failures[:20]))
    print(
        f"{options.files} files in {time.monotonic() - began:.0f} s: {dict(outcome.kinds)}; "
        f"{len(outcome.failures)} failures; slowest {outcome.slowest:.2f} s; "
        f"memory grew by {outcome.grown_bytes / 2**20:.1f} MiB"
    )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
