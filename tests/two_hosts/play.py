"""Plays the main job and its cuts, and says of each what a user of two machines would have seen."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.two_hosts import outcome
from tests.two_hosts.cuts import NOTICED_SECONDS, Cut
from tests.two_hosts.hosts import Host
from tests.two_hosts.job import Job, Launched, launch, launch_to_stand, wait_until_ended, wait_until_standing
from tests.waiting import wait_for

ROOM_OF_CHECKPOINTS = 1.5
WENT_ON = "went on to its end"


@dataclass(frozen=True)
class Told:
    """One trial: what it came to, and what is wrong with that."""

    name: str
    seconds: float | None
    """from the cut to the end of the last process that it left"""
    line: str
    """what the user reads first"""
    problems: Sequence[str]


@dataclass(frozen=True)
class Stand:
    """Where trials are played: the hosts, a folder for what they leave, an empty configuration, and their flags."""

    hosts: tuple[Host, Host]
    folder: Path
    flags: Sequence[str]
    timeout_minutes: int
    stall_seconds: float
    same_rows: bool
    """whether a run that goes on draws the same samples: embedded rollouts do, servers do not"""

    def job(self, name: str, *flags: str) -> Job:
        """A run in a folder of its own."""
        config, output = self.folder / "empty.yaml", self.folder / name / "run"
        output.parent.mkdir(parents=True, exist_ok=True)
        config.write_text("{}\n", encoding="utf-8")
        minutes = ("--distributed-timeout-minutes", str(self.timeout_minutes))
        return Job(config, output, (*self.flags, *minutes, *flags))

    def said(self, name: str, part: str) -> Path:
        return self.folder / name / part


def steps_for(num_cuts: int) -> int:
    """Steps of a run that is cut so often: each time in the next one, with a checkpoint before and a step behind it."""
    return num_cuts + 2


def play_main(stand: Stand) -> Told:
    """The job on two hosts, and the same ranks on one of them."""
    two, one = stand.job("two-hosts"), stand.job("one-host")
    problems = _ends_well(stand, two, stand.hosts, "two-hosts", "first")
    if stand.same_rows:
        problems += _ends_well(stand, one, stand.hosts[:1], "one-host", "first")
        problems = problems or _compared(one, two)
    return Told("main", None, "", problems)


def play_cuts(stand: Stand, cuts: Sequence[Cut], whole: Job) -> Iterator[Told]:
    """One job that is cut again and again, and begun again by the same line on both hosts, until it ends as ``whole``.

    A stall, after which it may go on, comes last.
    """
    job, has_ended = stand.job("cut"), False
    for step, cut in enumerate(sorted(cuts, key=lambda cut: cut.how == "stall"), start=2):
        said = stand.said("cut", cut.name)
        launched = launch_to_stand(job, stand.hosts, cut, step, said)
        wait_until_standing(cut, launched, said)
        told = _cut(stand, cut, job, launched, said)
        has_ended = told.line == WENT_ON
        so_far = [] if has_ended or not stand.same_rows else _rows_so_far(job, whole)
        for host in stand.hosts:
            host.end_all()
            host.set_link(up=True)
        yield replace(told, problems=[*told.problems, *so_far])
    problems = [] if has_ended else _ends_well(stand, job, stand.hosts, "cut", "end")
    yield Told("end", None, "", problems or _as_whole(stand, job, whole))


def _cut(stand: Stand, cut: Cut, job: Job, launched: Sequence[Launched], said: Path) -> Told:
    """What comes of ``cut``."""
    began = time.monotonic()
    _befall(stand, cut, said)
    left = [launched[host] for host in cut.survivors]
    bound = cut.bound_seconds(stand.timeout_minutes)
    try:
        statuses = wait_until_ended(left, seconds=4 * bound)
    except AssertionError:
        statuses = []
    seconds = time.monotonic() - began
    line = outcome.error_line(left[0].said) or ""
    if cut.how == "stall" and statuses == [0, 0]:
        return Told(cut.name, seconds, WENT_ON, [])
    problems = [] if seconds <= bound else [f"it took {seconds:.0f} s, and may take {bound:.0f}"]
    for number, one in zip(cut.survivors, left, strict=True):
        problems += _misbehaviour(stand, number, one)
    return Told(cut.name, seconds, line, [*problems, *outcome.torn(job.output)])


def play_full(stand: Stand, whole: Job) -> Told:
    """The job in a shared folder that has no room for its second checkpoint; then with room."""
    job = stand.job("full")
    size = sum(path.stat().st_size for path in (whole.output / "checkpoints" / "step_000001").rglob("*"))
    job.output.mkdir()
    _mount(job.output, size_kib=int(ROOM_OF_CHECKPOINTS * size) // 1024)
    try:
        launched = launch(job, stand.hosts, stand.said("full", "cut"))
        statuses = wait_until_ended(launched)
        ends = [one.ended for one in launched if one.ended is not None]
        apart = max(ends) - min(ends)
        line = outcome.error_line(launched[0].said) or ""
        problems = [] if "no space left on device; make room, then go on with" in line else ["no clear error"]
        problems += [f"statuses {statuses}"] if 0 in statuses else []
        problems += [f"hosts ended {apart:.0f} s apart"] if apart > NOTICED_SECONDS else []
        problems += outcome.torn(job.output)
        _mount(job.output, size_kib=20 * size // 1024, again=True)
        problems += _ends_well(stand, job, stand.hosts, "full", "again") or _as_whole(stand, job, whole)
        return Told("full", apart, line, problems)
    finally:
        subprocess.run(["umount", str(job.output)], check=False)


def _befall(stand: Stand, cut: Cut, said: Path) -> None:
    host = stand.hosts[cut.host]
    if cut.how != "crash":
        host.set_link(up=False)
    if cut.how in ("crash", "power"):
        host.end_all()
        return
    (said / "go").touch()
    if cut.how == "stall":
        time.sleep(stand.stall_seconds)  # the length of the stall is what is tried
        host.set_link(up=True)


def _misbehaviour(stand: Stand, number: int, one: Launched) -> list[str]:
    """What is wrong with the end of a host that the other one was lost to."""
    host, lost = stand.hosts[number], stand.hosts[1 - number].space
    problems = ["status 0"] if one.process.poll() == 0 else []
    line = outcome.error_line(one.said)
    if line is None or lost not in line or "go on with" not in line:
        problems.append(f"no line that names {lost} and says how to go on, but {line}")
    if others := [said for said in one.said.splitlines() if said.startswith("error: ") and said != line]:
        problems.append(f"more lines: {others}")
    if "[rank" in one.said:  # how torch marks what a rank's exception leaves; torchrun's own report is no rank's
        problems.append("a traceback of a rank")
    try:
        wait_for(lambda: not host.processes(), seconds=5.0)
    except AssertionError:
        problems.append(f"processes are left: {host.processes()}")
    return [f"host {number}: {problem}" for problem in problems]


def _ends_well(stand: Stand, job: Job, hosts: Sequence[Host], name: str, part: str) -> list[str]:
    launched = launch(job, hosts, stand.said(name, part))
    statuses = wait_until_ended(launched)
    problems = [f"statuses {statuses}: {launched[0].said[-2000:]}"] if any(statuses) else []
    left = [pid for host in hosts for pid in host.processes()]
    return problems + ([f"processes are left: {left}"] if left else [])


def _compared(job: Job, whole: Job) -> list[str]:
    problems = outcome.differences(outcome.rows_of(job.output), outcome.rows_of(whole.output))
    if outcome.export_of(job.output) != outcome.export_of(whole.output):
        problems.append("the exported weights differ")
    return problems


def _as_whole(stand: Stand, job: Job, whole: Job) -> list[str]:
    """Servers draw other samples every time; then it is the steps that have to be the same."""
    if stand.same_rows:
        return _compared(job, whole)
    steps = [[row["step"] for row in outcome.rows_of(one.output)] for one in (job, whole)]
    return [] if steps[0] == steps[1] else [f"steps {steps[0]} instead of {steps[1]}"]


def _rows_so_far(job: Job, whole: Job) -> list[str]:
    played = outcome.rows_of(job.output)
    return outcome.differences(played, outcome.rows_of(whole.output)[: len(played)])


def _mount(folder: Path, *, size_kib: int, again: bool = False) -> None:
    options = f"{'remount,' if again else ''}size={size_kib}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
