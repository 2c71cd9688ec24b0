"""Summary and report of any run from its files, or its table as it grows, without torch: ``prism-report RUN``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.report import ReportConfig
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import ConfigError, DataError, PrismError
from prism_megatron.evaluation.sample import Sample, read_samples
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import Row, read_metrics
from prism_megatron.observability.progress import Progress
from prism_megatron.observability.summary import SECONDS_PREFIX, RunFacts
from prism_megatron.run.console import Console
from prism_megatron.run.files import CONFIG, METRICS, RECORD, REPORT, SAMPLES, SUMMARY
from prism_megatron.run.follow import RowClock, RowReader, follow
from prism_megatron.run.record import RunRecord, read_record
from prism_megatron.run.reporting import newest_checkpoint, path_text, write_both
from prism_megatron.stages.align.view import VIEW as ALIGN
from prism_megatron.stages.rlvr.view import VIEW as RLVR
from prism_megatron.stages.sft.view import VIEW as SFT
from prism_megatron.stages.warm_start.view import VIEW as WARM_START
from prism_megatron.terminal import INTERRUPTED

VIEWS: Mapping[str, StageView] = {"align": ALIGN, "warm-start": WARM_START, "sft": SFT, "rlvr": RLVR}

_TOLD_BY_THE_RUN = ("ended", "exported", "held_out")
_POLL_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 for bad input, in one line; 130 where the watching was ended by Ctrl-C, as it mostly is."""
    try:
        config = parse_over(
            ReportConfig(), sys.argv[1:] if argv is None else argv, description=ReportConfig.__doc__ or ""
        )
        folder = _run_folder(config.run)
        if config.follow:
            _watch(folder, Console())
        else:
            for line in remake(folder):
                print(line)
    except PrismError as error:
        return report_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        # Files of a run may come from anywhere, and a figure may be anything that JSON has.
        return report_error(DataError(f"a file of {config.run} holds what no run writes ({error!r}); remove it"))
    return 0


def remake(folder: Path) -> list[str]:
    """Write both files of the run in ``folder``; what was written and what was missing, a line each.

    Raises DataError where there are no rows, or where a file is damaged.
    """
    if not (folder / METRICS).is_file():
        raise DataError(f"{folder} has no {METRICS}: no step was played, so there is nothing to report")
    rows, lines = read_metrics(folder / METRICS), []
    record, before = read_record(folder / RECORD), _summary(folder)
    if record is None:
        lines.append(f"{RECORD} is missing, as in runs of older versions: stage, layout and versions are guessed")
    samples: list[Sample] = []
    if (folder / SAMPLES).is_file():
        samples = read_samples(folder / SAMPLES)
    else:
        lines.append(f"{SAMPLES} is missing: the report shows no answers")
    view = _view(record, rows)
    title = f"Run in {folder.name}" if record is None else record.title
    facts = _facts(folder, record, before, rows)
    # What neither rows nor run.json tell, such as held-out figures, stays as the run itself wrote it.
    kept = {key: before[key] for key in _TOLD_BY_THE_RUN if key in before}
    write_both(folder, view=view, title=title, rows=rows, facts=facts, samples=samples, more={"ended": None, **kept})
    return [*lines, f"wrote {folder / SUMMARY} and {folder / REPORT}: {len(rows)} steps"]


def _facts(folder: Path, record: RunRecord | None, before: Mapping[str, Any], rows: Sequence[Row]) -> RunFacts:
    """From run.json, and of an older run from the summary that it wrote, where it did."""
    in_steps = {key.removeprefix(SECONDS_PREFIX) for row in rows for key in row}
    versions: Mapping[str, str | None] = {} if record is None else record.versions
    return RunFacts(
        world_size=before.get("world_size") if record is None else record.world_size,
        layout=before.get("layout", {}) if record is None else record.layout,
        hf_export=before.get("hf_export"),
        checkpoint=path_text(newest_checkpoint(folder)),
        megatron_core=versions.get("megatron-core") or before.get("megatron_core"),
        torch=versions.get("torch") or before.get("torch"),
        data=before.get("data", {}) if record is None else record.data,
        other_seconds={
            phase: seconds for phase, seconds in before.get("seconds_by_phase", {}).items() if phase not in in_steps
        },
    )


def _view(record: RunRecord | None, rows: Sequence[Row]) -> StageView:
    """Raises DataError for a stage that nobody knows."""
    if record is not None:
        if record.stage not in VIEWS:
            raise DataError(f"{RECORD} is of stage {record.stage!r}; this version knows {' and '.join(VIEWS)}")
        return VIEWS[record.stage]
    if any("policy_version" in row for row in rows):
        return ALIGN
    return SFT if any("samples" in row for row in rows) else WARM_START


def _watch(folder: Path, console: Console) -> None:
    """The table until the run has ended, or nobody reads it any more."""
    reader, clock = RowReader(folder / METRICS), RowClock()
    progress = Progress(stream=console, clock=clock)
    has_begun = False

    def show(row: Row) -> None:
        nonlocal has_begun
        if not has_begun:
            record = read_record(folder / RECORD)
            total = None if record is None else record.total_steps
            progress.begin_table(_view(record, [row]).columns, total_steps=total)
            has_begun = True
        clock.move_to(row)
        progress.row(row)

    def ended() -> str | None:
        said = _summary(folder).get("ended")
        return None if said is None else repr(str(said))[1:-1]

    def wait() -> None:
        if console.is_read:
            time.sleep(_POLL_SECONDS)
        else:
            raise KeyboardInterrupt

    if not (folder / METRICS).exists():
        console.line(f"waiting for the first step of {folder}")
    follow(reader, show=show, say=console.line, ended=ended, wait=wait)


def _summary(folder: Path) -> Mapping[str, Any]:
    """The run's own summary; empty where there is none. Raises DataError for a damaged one."""
    path = folder / SUMMARY
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and it is made anew") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} holds no object; remove it, and it is made anew")
    return document


def _run_folder(name: str) -> Path:
    """Raises ConfigError for anything but a run's folder."""
    folder = Path(name)
    if not name or not any((folder / file).is_file() for file in (CONFIG, METRICS, RECORD)):
        raise ConfigError(f"{name or 'RUN'!r} is no run's folder; give one with a {CONFIG} or a {METRICS}")
    return folder
