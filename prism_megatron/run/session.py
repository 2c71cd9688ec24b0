"""What the parts of one run share: its world and folder, its clocks, its lines on the terminal, its checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.observability.activity import Activity, Heartbeat, Watched
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.progress import Columns, Progress
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.run.checkpoints import Checkpoints
from prism_megatron.run.console import Console
from prism_megatron.run.ending.idle import Idleness
from prism_megatron.run.ending.stopping import Stopping
from prism_megatron.run.files import CONSOLE


class Session:
    """One run of one stage. Lines are the main rank's, and nobody's where it is ``quiet``."""

    def __init__(
        self,
        world: World,
        output: Path,
        *,
        checkpoints: Checkpoints | None = None,
        restored: Path | None = None,
        max_minutes: float | None = None,
        quiet: bool = False,
    ) -> None:
        """``restored`` is the checkpoint that the run goes on from, if there is one."""
        self.world = world
        self.output = output
        self.restored = restored
        self.checkpoints = checkpoints or Checkpoints(output)
        self.stopping = Stopping(max_minutes)
        self.idleness = Idleness(0)
        self.is_settled = False
        """whether the run has begun: from then on trouble ends with the command that goes on"""
        self.activity = Activity()
        self.timers = PhaseTimers(activity=self.activity)
        self.other_seconds: dict[str, float] = {}
        self.console = Console() if world.is_main and not quiet else None
        self._heartbeat: Heartbeat | None = None
        self._progress = None if self.console is None else Progress(stream=self.console)

    @property
    def layout_text(self) -> str:
        """The sizes of the parallel groups."""
        return " ".join(f"{axis}{size}" for axis, size in self.world.layout.items())

    def begin(self) -> None:
        """From now on a silence is broken by what the run is at: checking data and loading weights take long too.

        :meth:`close` ends it.
        """
        if self.console is not None:
            console = self.console
            self._heartbeat = Heartbeat(self.activity, say=console.line, seconds_silent=lambda: console.seconds_silent)

    def open(self) -> None:
        """Once the run's folder is this run's: from now on lines are kept there too. :meth:`close` ends it."""
        if self.console is not None:
            self.console.open(self.output / CONSOLE)

    def close(self) -> None:
        """Close what :meth:`begin` and :meth:`open` opened, and leave a save under way. May be called again."""
        self.checkpoints.abandon()
        if self._heartbeat is not None:
            self._heartbeat.close()
        if self.console is not None:
            self.console.close()

    def watch(self, *workers: object) -> None:
        """Have those that count what they do tell this run's activity."""
        for worker in workers:
            if isinstance(worker, Watched):
                worker.activity = self.activity

    def show_text(self, text: str) -> None:
        """Lines as they are, without the seconds."""
        if self.console is not None:
            self.console.line(text)

    def note(self, text: str) -> None:
        """A last line for the run's console.log alone; the command says it too, after everything else."""
        if self.console is not None:
            self.console.keep(text)

    def say(self, text: str) -> None:
        """One line with the seconds so far."""
        if self._progress is not None:
            self._progress.phase(text)

    @contextmanager
    def phase(self, name: str, text: str = "") -> Iterator[None]:
        """Time a phase outside the steps, and say that it begins."""
        if text:
            self.say(text)
        started = time.perf_counter()
        with self.activity.phase(name):
            yield
        self.other_seconds[name] = self.other_seconds.get(name, 0.0) + time.perf_counter() - started

    def go_back(self, engines: Mapping[str, MegatronEngine]) -> None:
        """Give all ``engines`` the weights of the newest good checkpoint; all ranks together."""
        if (saved := self.checkpoints.settle()) is not None:
            self.say(f"saved {saved}")
        self.say(f"{' and '.join(engines)} are those of {self.checkpoints.go_back(engines)} again")

    def begin_table(self, columns: Columns, *, total_steps: int) -> None:
        """What :meth:`show` shows of every row."""
        if self._progress is not None:
            self._progress.begin_table(columns, total_steps=total_steps)

    def show(self, row: Row) -> None:
        """One line of the live table."""
        if self._progress is not None:
            self._progress.row(row)
