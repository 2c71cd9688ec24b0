"""Reads damaged input by the thousand: each is read, or refused by one PrismError that names it; nothing else happens.

A kind of input is a ``Kind``: one that makes a case from a random generator, and one that reads it as the product does.
``KINDS`` in ``tests/fuzz/__main__.py`` lists them; a new kind is a new entry there.
"""

from __future__ import annotations

import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from prism_megatron.errors import PrismError

SECONDS_A_CASE = 5.0
WARM_UP_SHARE = 0.1
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One damaged input; ``label`` says how it was made."""

    label: str
    data: bytes
    must_be_read: bool = False
    """whether the damage is no reason to refuse it"""


@dataclass(frozen=True)
class Kind:
    """Damaged inputs of one kind."""

    name: str
    file_name: str
    """of the file that a case is written to, and that an error must name"""
    make: Callable[[random.Random], Case]
    read: Callable[[Path], None]
    """reads the file as the product does; raises PrismError where the product refuses it"""


@dataclass
class Outcome:
    """What became of all cases."""

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """by the class of the error"""
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    rss_first_mib: float = 0.0
    """after the warm-up, a tenth of the cases"""
    rss_last_mib: float = 0.0
    rss_peak_mib: float = 0.0
    """of the process, at any time"""

    @property
    def text(self) -> str:
        """One line of figures."""
        refused = ", ".join(f"{count} {name}" for name, count in self.refused.most_common())
        return (
            f"{self.read} read, {self.refused.total()} refused ({refused}), {len(self.failures)} failures, slowest "
            f"{self.slowest_seconds:.2f} s, RSS {self.rss_first_mib:.0f} MiB first, {self.rss_last_mib:.0f} MiB last, "
            f"{self.rss_peak_mib:.0f} MiB at most"
        )


def fuzz(kind: Kind, count: int, *, seed: int, folder: Path, on_case: Callable[[int], None] | None = None) -> Outcome:
    """``count`` cases; case number i is the same for one seed, whatever came before it."""
    outcome, process = Outcome(), psutil.Process()
    path = folder / kind.file_name
    for number in range(count):
        if number == int(count * WARM_UP_SHARE):
            outcome.rss_first_mib = process.memory_info().rss / MIB
        if on_case is not None:
            on_case(number)
        case = kind.make(random.Random(f"{seed}/{kind.name}/{number}"))
        path.write_bytes(case.data)
        started = time.perf_counter()
        failure = _failure(kind, case, path, outcome)
        seconds = time.perf_counter() - started
        outcome.slowest_seconds = max(outcome.slowest_seconds, seconds)
        if failure is None and seconds > SECONDS_A_CASE:
            failure = f"took {seconds:.1f} s"
        if failure is not None:
            outcome.failures.append(f"{kind.name} {number} ({case.label}): {failure}")
    outcome.rss_peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    outcome.rss_last_mib = process.memory_info().rss / MIB
    return outcome


def _failure(kind: Kind, case: Case, path: Path, outcome: Outcome) -> str | None:
    """What is wrong with how the case was taken; None for one that was read or refused as it should be."""
    try:
        kind.read(path)
    except PrismError as error:
        outcome.refused[type(error).__name__] += 1
        text = str(error)
        if str(path) not in text:
            return f"the error does not name the file: {text}"
        if "\n" in text:
            return f"the error has several lines: {text!r}"
        return f"refused: {text}" if case.must_be_read else None
    except Exception as error:  # noqa: BLE001  # anything else is what is looked for
        return f"{type(error).__name__}: {error}"
    outcome.read += 1
    return None
