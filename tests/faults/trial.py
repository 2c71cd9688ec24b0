"""One trial: a run, its fault, the same command again until it is done, and the verdict."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY
from tests.faults import clock, faults, judge, processes
from tests.faults.draw import Setting, Trial
from tests.faults.stages import Inputs, command, results_of, rows_of
from tests.faults.watch import START, Watch

MOST_TRIES = 3
_PATIENCE_SECONDS = 240.0


@dataclass(frozen=True)
class Reference:
    """What a run comes to that is left alone."""

    rows: Sequence[dict[str, Any]]
    results: dict[str, str]
    landmarks: dict[str, float]
    """with the seconds after which each was seen"""


@dataclass
class Outcome:
    """A trial's verdict, with what led to it."""

    trial: Trial
    struck: str = ""
    """what was done, to whom, and when"""
    statuses: list[int] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        """A line of the campaign's log."""
        return {**self.trial.to_plain(), "struck": self.struck, "statuses": self.statuses,
                "tries": len(self.statuses), "seconds": round(self.seconds, 1),
                "verdict": "failed" if self.complaints else "passed", "complaints": self.complaints}  # fmt: skip


class Try:
    """A command under way, in ``folder``, with its output in files."""

    def __init__(self, words: Sequence[str], folder: Path, output: Path, *, tag: str, number: int) -> None:
        (folder / "tmp").mkdir(exist_ok=True)
        self.tag, self.output, self.clock = tag, output, folder / "clock"
        self._errors = folder / f"try-{number}.err"
        shim = clock.shim(folder / "shim")
        environment = {
            **os.environ, processes.TAG: tag, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"),
            clock.FILE: str(self.clock), "PYTHONPATH": f"{shim}{os.pathsep}{REPOSITORY}",
        }  # fmt: skip
        self.watch = Watch(output)
        with (folder / f"try-{number}.out").open("w") as said, self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=said, stderr=errors, cwd=folder, env=environment,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    @property
    def status(self) -> int | None:
        """Its exit status, once it has ended."""
        return self._process.poll()

    def finish(self) -> int | None:
        """Its exit status; None where it hangs, and then all of it is ended."""
        if not self.watch.until(lambda: self.status is not None, seconds=_PATIENCE_SECONDS):
            self.end()
            return None
        return self.status

    def end(self) -> None:
        """SIGKILL to all that belongs to it, whatever it is at."""
        while found := processes.of_trial(self.tag):
            processes.kill([one.pid for one in found])
            self.status  # noqa: B018  # asking reaps it
        self._process.wait()


def play_reference(setting: Setting, inputs: Inputs, folder: Path) -> Reference:
    """A run that is left alone. Raises RuntimeError where it fails by itself."""
    folder.mkdir(parents=True)
    output = folder / "run"
    attempt = Try(command(setting, inputs, output, torchrun=False), folder, output, tag=f"reference-{os.getpid()}",
                  number=1)  # fmt: skip
    if (status := attempt.finish()) != 0:
        raise RuntimeError(f"{setting} ended with status {status} although nothing befell it:\n{attempt.errors}")
    found = Reference(rows_of(output), results_of(setting, output), attempt.watch.seen)
    shutil.rmtree(folder)
    return found


def play(trial: Trial, reference: Reference, inputs: Inputs, folder: Path) -> Outcome:
    """The whole trial, in a new ``folder``."""
    folder.mkdir(parents=True)
    outcome = Outcome(trial)
    began = Watch(folder)
    with ExitStack() as stack:
        home = folder
        if trial.fault == "disk":
            stack.enter_context(faults.small_disk(folder / "disk"))
            home = folder / "disk"
        output = home / "run"
        words = command(trial.setting, inputs, output, torchrun=trial.torchrun)
        while len(outcome.statuses) < MOST_TRIES:
            number = len(outcome.statuses) + 1
            attempt = Try(words, folder, output, tag=f"{trial.seed}-{os.getpid()}", number=number)
            stack.callback(attempt.end)
            victim = _strike(trial, reference, attempt, outcome) if number == 1 else None
            status = attempt.finish()
            outcome.statuses.append(-999 if status is None else status)
            outcome.complaints += _look(trial, attempt, status, victim, output, first=number == 1)
            if status is None or status == 0:
                break
            if number == 1:
                _mend(trial, outcome, output, home)
        outcome.complaints += _verdict(trial, reference, outcome, output)
    outcome.seconds = began.seconds
    return outcome


def _strike(trial: Trial, reference: Reference, attempt: Try, outcome: Outcome) -> str:
    """Wait for the moment, then do it. Returns who was killed: a role, ``everything``, or nobody (``""``)."""
    marks = list(reference.landmarks)
    index = int(trial.place * (len(marks) - 1))
    later = set(marks[index:])
    attempt.watch.until(lambda: attempt.status is not None or bool(later & attempt.watch.seen.keys()),
                        seconds=_PATIENCE_SECONDS)  # fmt: skip
    reached = max((marks.index(name) for name in attempt.watch.seen if name in reference.landmarks), default=0)
    gap = reference.landmarks[marks[min(reached + 1, len(marks) - 1)]] - reference.landmarks[marks[reached]]
    until = attempt.watch.seconds + trial.delay * max(gap, 0.0)
    attempt.watch.until(lambda: attempt.status is not None or attempt.watch.seconds >= until, seconds=_PATIENCE_SECONDS)
    when = f"{trial.delay * max(gap, 0.0):.2f} s after {marks[reached] if reached else START}"
    if attempt.status is not None:
        outcome.struck = f"nothing: it had ended ({when})"
        return ""
    return _do(trial, attempt, outcome, when)


def _do(trial: Trial, attempt: Try, outcome: Outcome, when: str) -> str:
    if trial.fault == "disk":
        faults.fill(attempt.output.parent)
        outcome.struck = f"the disk was filled {when}"
    elif trial.fault == "clock":
        forward = trial.choice < 0.5
        clock.jump(attempt.clock, forward=forward)
        outcome.struck = f"the clock was put an hour {'forward' if forward else 'back'} {when}"
    elif trial.fault == "kill":
        return _kill_one(trial, attempt, outcome, when)
    else:
        attempt.end()
        outcome.struck = f"everything was killed {when}"
        return "everything"
    return ""


def _kill_one(trial: Trial, attempt: Try, outcome: Outcome, when: str) -> str:
    seen = processes.of_trial(attempt.tag)
    roles = processes.roles_of(seen, root=attempt.pid, ranks=trial.setting.ranks,
                               pipeline=trial.setting.stage == "pipeline")  # fmt: skip
    for role in trial.roles:
        members = [one for one in seen if roles[one.pid] == role]
        if members:
            place = int(trial.member * len(members))
            processes.kill([members[place].pid])
            outcome.struck = f"{role} {place + 1} of {len(members)} was killed {when}"
            return "everything" if members[place].pid == attempt.pid else role
    outcome.struck = f"nothing: no process was there ({when})"
    return ""


def _look(
    trial: Trial, attempt: Try, status: int | None, victim: str | None, output: Path, *, first: bool
) -> list[str]:
    """What is wrong after one try."""
    if status is None:
        return [f"it hung for {_PATIENCE_SECONDS:.0f} s and was ended"]
    found = [f"left: {one.words[:120]}" for one in processes.left(attempt.tag)]
    found += judge.torn(output)
    if first:
        found += judge.ill_said(trial.fault, victim, status, attempt.errors, torchrun=trial.torchrun)
    elif status != 0:
        found.append(f"a later try ended with status {status}: {attempt.errors[-300:]!r}")
    return found


def _mend(trial: Trial, outcome: Outcome, output: Path, home: Path) -> None:
    """What happens between a fault and the next try."""
    if trial.fault == "disk":
        faults.make_room(home)
    if trial.fault == "damage":
        cut = faults.damage(output, choice=trial.choice, share=trial.share)
        outcome.struck += f"; {cut}" if cut else "; no checkpoint had an older one, so none was cut"


def _verdict(trial: Trial, reference: Reference, outcome: Outcome, output: Path) -> list[str]:
    """What is wrong at the end."""
    if outcome.statuses[-1] != 0:
        return [f"not done after {len(outcome.statuses)} tries"]
    found = judge.leftovers(output)
    rows = rows_of(output)
    if trial.setting.rollout == "served":
        return found + judge.inconsistent_rows(rows, reference.rows)
    found += judge.differing_rows(rows, reference.rows)
    return found + judge.differing_results(results_of(trial.setting, output), reference.results)
