"""Where rows go beside ``metrics.jsonl``: TensorBoard and W&B, each an extra of this package's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from prism_megatron.config.run import Sink as SinkName
from prism_megatron.errors import ConfigError
from prism_megatron.observability.metrics import Row
from prism_megatron.run.files import REPORT
from prism_megatron.run.record import RunRecord

PROJECT = "prism_megatron"
"""of W&B, where WANDB_PROJECT names none"""


class Sink(Protocol):
    """Takes the rows of a run, one a step, in order."""

    def write(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """After the last row; the report is written by now."""


def check_sinks(names: Iterable[SinkName]) -> None:
    """Raises ConfigError where a package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"--log-to {name} needs a package that is not installed: pip install -e .[{name}]")


def open_sinks(
    names: Sequence[SinkName],
    *,
    folder: Path,
    record: RunRecord,
    first_step: int,
    run_name: str | None,
    config: Mapping[str, Any],
    say: Callable[[str], None],
) -> list[Sink]:
    """Those that are named, for the run in ``folder``; one that cannot be opened, or breaks later, is told by ``say``.

    ``run_name`` is what the run is called there, by default its folder's name; ``config`` is shown beside it.
    """
    openers: Mapping[SinkName, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoardSink(folder / "tensorboard", first_step=first_step),
        "wandb": lambda: WandbSink(folder, id=record.id, name=run_name or folder.resolve().name, config=config),
    }
    return [Forgiving(name, openers[name], say) for name in names]


class Forgiving:
    """Another sink whose failures cost the run one line: a network that is gone must not end what it only watches."""

    def __init__(self, name: str, opener: Callable[[], Sink], say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._sink: Sink | None = None
        self._try(lambda: setattr(self, "_sink", opener()))

    def write(self, row: Row) -> None:
        """Take one row, or nothing after a failure."""
        if self._sink is not None:
            sink = self._sink
            self._try(lambda: sink.write(row))

    def close(self) -> None:
        """Close the other sink, where it has not failed. May be called again."""
        if self._sink is not None:
            self._try(self._sink.close)
            self._sink = None

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  # vendors raise what they like
            self._sink = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"WARNING: --log-to {self._name} gets no more rows ({reason}); metrics.jsonl has all of them")


class TensorBoardSink:
    """Event files in the run's folder: ``tensorboard --logdir RUN``."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Rows of ``first_step`` and later ones that an earlier command wrote are hidden: they come again."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def write(self, row: Row) -> None:
        """All numbers of the row, under its step."""
        for name, value in numbers(row).items():
            if name != "step":
                self._writer.add_scalar(name, value, global_step=int(row["step"] or 0))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandbSink:
    """A run of W&B, with its configuration and, at the end, its report. W&B's own variables hold."""

    def __init__(self, folder: Path, *, id: str, name: str, config: Mapping[str, Any]) -> None:  # noqa: A002
        """``id`` is the run's own: a run that goes on goes on there too."""
        import wandb

        self._page = wandb.Html
        self._report = folder / REPORT
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=id,
            name=name,
            dir=str(folder),
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(console="off"),  # console.log has the lines
        )
        # Steps that are played again come again: W&B's own counter would drop them.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """All numbers of the row."""
        self._run.log(numbers(row))

    def close(self) -> None:
        """Attach the report and end the run."""
        if self._report.exists():
            with self._report.open(encoding="utf-8") as page:
                self._run.log({"report": self._page(page, inject=False)})
        self._run.finish()


def numbers(row: Row) -> dict[str, float]:
    """What of a row can be drawn: neither text nor what has no data."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}
