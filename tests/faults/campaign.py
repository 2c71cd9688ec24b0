"""Trials one after the other, in one folder."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path

from tests.faults.draw import Setting, draw
from tests.faults.faults import may_mount
from tests.faults.stages import Inputs
from tests.faults.trial import Outcome, Reference, play, play_reference


class Campaign:
    """Trials in one folder, with what they share: inputs, and the runs that are left alone."""

    def __init__(self, folder: Path, log: Path | None) -> None:
        """``log`` gets a line of JSON a trial, as does the terminal."""
        self._folder, self._log = folder, log
        self._began = time.monotonic()
        self._inputs = Inputs(folder / "inputs")
        self._inputs.make()
        self._references: dict[Setting, Reference] = {}
        self._may_mount = may_mount(folder)
        self._verdicts: Counter[str] = Counter()
        if not self._may_mount:
            print("this user may not mount a file system: no disk is filled, a process is killed instead", flush=True)

    def play(self, seed: str) -> Outcome:
        """One trial, which is logged; what it wrote is kept where it failed."""
        trial = draw(seed, may_mount=self._may_mount)
        if trial.setting not in self._references:
            place = self._folder / "reference"
            self._references[trial.setting] = play_reference(trial.setting, self._inputs, place)
        place = self._folder / f"trial-{seed}"
        outcome = play(trial, self._references[trial.setting], self._inputs, place)
        line = json.dumps(outcome.to_plain())
        print(line, flush=True)
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{line}\n")
        self._verdicts["failed" if outcome.complaints else "passed"] += 1
        if not outcome.complaints:
            shutil.rmtree(place)
        return outcome

    def end(self) -> int:
        """Say what came of it, and return the exit status."""
        passed, failed = self._verdicts["passed"], self._verdicts["failed"]
        kept = f"; what they wrote is in {self._folder}" if failed else ""
        print(
            f"{passed} of {passed + failed} trials passed in {time.monotonic() - self._began:.0f} s{kept}", flush=True
        )
        if not failed:
            shutil.rmtree(self._folder)
        return int(failed > 0)
