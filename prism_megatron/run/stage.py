"""What the driver knows of a stage, and all it knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from prism_megatron.conversion.checkpoints.folder import ModelFiles
from prism_megatron.data.identity import Identity
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.evaluation.sample import Sample
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import Row

Verdict = Literal["go on", "stop"]
Plain = Mapping[str, Any]
"""What JSON can hold, by name."""


@dataclass(frozen=True)
class Outcome:
    """What one step came to, for those who watch the run. The same on every rank."""

    row: Row
    verdict: Verdict = "go on"
    good: bool = True
    """whether a checkpoint of this step is one to go back to"""
    best: bool = False
    """whether it is the best so far on what is held out, so that ``--keep-last`` leaves it until a better one"""
    learned: Collection[str] = ()
    """roles that an update changed"""
    idle: Mapping[str, str] = field(default_factory=dict)
    """roles that were to learn and did not, each with the reason; a role that rests on purpose is in neither"""
    lines: Sequence[str] = ()
    """what a reader of the table should be told below it"""


@dataclass(frozen=True)
class Artefacts:
    """What a finished stage leaves."""

    export: Path
    """the model folder that it made"""
    exported: str = "the model"
    """what the export is, in words: never more than was done to it"""
    figures: Plain = field(default_factory=dict)
    """what the summary has beyond the figures of all stages"""
    problem: str | None = None
    """why the run counts as failed although everything was written"""


class Stage(Protocol):
    """A stage of training that is ready to be played; its weights are loaded."""

    name: str
    """as checkpoints and folders have it"""
    total_steps: int
    title: str
    """what the run is, in words: the report's head"""
    view: StageView
    """how its rows are shown"""
    models: Mapping[str, ModelFiles]
    """what checkpoints keep of each role beside its weights"""
    may_go_back: bool
    """whether a step may ask for an earlier checkpoint, so that there must be one from the start"""

    @property
    def identity(self) -> Identity:
        """Which data it trains on."""

    @property
    def data_counts(self) -> Mapping[str, int]:
        """Lines of that data, how many are kept, and how many are left out for each reason; empty where all is made."""

    def engines(self) -> Mapping[str, MegatronEngine]:
        """The roles that a checkpoint holds."""

    def restore(self, state: Plain) -> None:
        """Take back what :meth:`state` gave. Raises CheckpointError where it does not fit this run."""

    def prepare(self, first_step: int) -> None:
        """Whatever must happen once before ``first_step``, with the weights that are loaded by now."""

    def finished(self) -> str | None:
        """Why no step is left although there are fewer than ``total_steps``; None where steps are left."""

    def play(self, step: int) -> Outcome:
        """One step, on all ranks together. Its phases are timed with the session's timers."""

    def state(self) -> Plain:
        """What a checkpoint keeps beside the engines, as JSON."""

    def samples(self) -> Sequence[Sample]:
        """Answers of the last step for the report; none before the first."""

    def finish(self, output: Path) -> Artefacts:
        """Evaluate and export into the run's folder, on all ranks together, after the last step."""

    def close(self) -> None:
        """Release what samples. May be called again, and after a failure."""
