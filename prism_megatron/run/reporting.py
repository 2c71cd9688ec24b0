"""Summary and report of a run, kept up to date while it goes on, and made again from its files afterwards.

Nothing here needs torch: ``tools/report.py`` uses it on any machine that sees the folder.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from prism_megatron.conversion.checkpoints.folder import STATE_FILE
from prism_megatron.errors import PrismError
from prism_megatron.evaluation.report import write_report
from prism_megatron.evaluation.sample import Sample, read_samples, write_samples
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import Row, read_metrics
from prism_megatron.observability.summary import RunFacts, summarise, write_summary
from prism_megatron.run.files import CHECKPOINTS, METRICS, RECORD, REPORT, SAMPLES, SUMMARY
from prism_megatron.run.record import RunRecord, read_record, write_record

if TYPE_CHECKING:
    from prism_megatron.run.session import Session
    from prism_megatron.run.sinks import Sink
    from prism_megatron.run.stage import Artefacts, Stage

OpenSinks = Callable[[RunRecord, int], Sequence["Sink"]]
"""Of a run, from its first step of this command on."""

PACKAGES = ("megatron-core", "torch", "transformers")
"""Those whose versions are noted."""


class Reporter:
    """Writes of one run what a reader wants to see: run.json, and every so many steps summary, report and samples.

    The main rank's; on others it does nothing. A body that is left with an error is reported as far as it came.
    """

    def __init__(
        self,
        session: Session,
        stage: Stage,
        *,
        every: int,
        open_sinks: OpenSinks = lambda _record, _first_step: (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``every`` counts steps between two reports; ``open_sinks`` makes what else takes the rows, till the end."""
        self.ended: str | None = None
        """how the run ended, in words, as the summary says; None while it goes on"""
        self._session, self._stage, self._every, self._now = session, stage, every, now
        self._open_sinks = open_sinks
        self._sinks: Sequence[Sink] = ()
        self._rows: list[Row] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._rows:
            self.ended = f"failed: {' '.join(str(error).split()) or type(error).__name__}"
            self._try_to_write()
        self._close()

    def _close(self) -> None:
        """Nothing more is written: whoever waits for the main rank need wait no longer."""
        self._rows, sinks, self._sinks = None, self._sinks, ()
        for sink in sinks:
            sink.close()

    def begin(self, first_step: int) -> None:
        """Before this command's first step: note what the run is, and that it goes on."""
        if not self._session.world.is_main:
            return
        output, stage, world = self._session.output, self._stage, self._session.world
        known = read_record(output / RECORD)
        record = RunRecord(
            id=self._session.checkpoints.run or (uuid.uuid4().hex if known is None else known.id),
            stage=stage.name,
            title=stage.title,
            created=utc_text(self._now()) if known is None else known.created,
            total_steps=stage.total_steps,
            world_size=world.world_size,
            layout=dict(world.layout),
            versions={name: version(name) for name in PACKAGES},
            data=stage.data_counts,
        )
        write_record(output / RECORD, record)
        self._rows = _rows_in(output)
        if self._rows:
            self._try_to_write()
        self._sinks = self._open_sinks(record, first_step)

    def step(self, row: Row) -> None:
        """After the row of a step was written."""
        if self._rows is None:
            return
        self._rows.append(row)
        for sink in self._sinks:
            sink.write(row)
        if (int(row["step"] or 0) + 1) % self._every == 0:
            self._try_to_write()

    def stop(self, reason: str) -> None:
        """Where the run ends before its last step: how far it came, and why."""
        self.ended = reason
        if self._rows:
            self._write()
        self._close()

    def finish(self, artefacts: Artefacts) -> None:
        """After the stage has finished: everything that is known, and the line that says where it stands."""
        if not self._session.world.is_main:
            return
        self.ended = "done"
        self._write(export=str(artefacts.export), figures={"exported": artefacts.exported, **artefacts.figures})
        output = self._session.output
        written = (output / SUMMARY, output / REPORT, newest_checkpoint(output), artefacts.export)
        self._session.say(f"done: {', '.join(map(str, written))}")
        self._close()

    def _try_to_write(self) -> None:
        """A report in mid-run is no reason to end it."""
        try:
            self._write()
        except (OSError, PrismError) as error:
            self._session.say(f"the report could not be written: {error}")

    def _write(self, *, export: str | None = None, figures: Mapping[str, Any] | None = None) -> None:
        output, stage = self._session.output, self._stage
        samples = stage.samples()
        if samples:
            write_samples(output / SAMPLES, samples)
        elif (output / SAMPLES).exists():
            samples = read_samples(output / SAMPLES)
        write_both(
            output,
            view=stage.view,
            title=stage.title,
            rows=self._rows if self._rows is not None else _rows_in(output),
            facts=RunFacts(
                world_size=self._session.world.world_size,
                layout=self._session.world.layout,
                hf_export=export,
                checkpoint=path_text(newest_checkpoint(output)),
                megatron_core=version("megatron-core"),
                torch=version("torch"),
                other_seconds=self._session.other_seconds,
                data=stage.data_counts,
            ),
            samples=samples,
            more={"ended": self.ended, **(figures or {})},
        )


def write_both(
    folder: Path,
    *,
    view: StageView,
    title: str,
    rows: Sequence[Row],
    facts: RunFacts,
    samples: Sequence[Sample],
    more: Mapping[str, Any],
) -> None:
    """``summary.json`` and ``report.html`` of a run; ``more`` is what its summary has beyond its rows' figures."""
    summary = {**summarise(rows, facts), **view.summarise(rows), **more}
    write_summary(folder / SUMMARY, summary)
    write_report(folder / REPORT, title=title, view=view, rows=rows, summary=summary, samples=samples)


def _rows_in(folder: Path) -> list[Row]:
    """Those of a run that has played steps there; a run that goes on in a new folder may have none to play."""
    return list(read_metrics(folder / METRICS)) if (folder / METRICS).exists() else []


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete one in a run's folder."""
    complete = (folder / CHECKPOINTS).glob(f"step_*/{STATE_FILE}")
    return max((path.parent for path in complete), default=None, key=lambda path: path.name)


def path_text(path: Path | None) -> str | None:
    """As the summary has it."""
    return None if path is None else str(path)


def utc_text(moment: datetime) -> str:
    """ISO 8601 with seconds: ``2026-11-28T22:58:29Z``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
