"""A run's checkpoints: saving, keeping, going on, going back.

One that is written beside the steps counts once it is committed: until then older ones are neither removed for it nor
forgotten as what to go back to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config.resume import changeable
from prism_megatron.conversion.checkpoints.folder import STATE_FILE, latest, step_folder
from prism_megatron.data.identity import what_differs
from prism_megatron.disk import writing
from prism_megatron.engine import checkpoint
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.saving import Saving
from prism_megatron.errors import CheckpointError
from prism_megatron.parallel.collectives import broadcast_object, on_main
from prism_megatron.run.files import CHECKPOINTS
from prism_megatron.run.saved import SavedRun
from prism_megatron.run.stage import Stage

_REMOVED = ".removed"
_DATA_FLAGS = frozenset(
    {"data", "pairs", "model", "prompts-per-step", "max-prompt-tokens", "max-response-tokens", "system-prompt",
     "strict-format", "on-bad"}
)  # fmt: skip
"""Flags that decide which examples there are, and how many are taken at a time."""


@dataclass(frozen=True, eq=False)
class _UnderWay:
    """A save that is not committed yet, and what it will be then."""

    saving: Saving
    step: int
    good: bool
    best: bool


@dataclass(eq=False)
class Checkpoints:
    """Those of one run, in its folder ``output``; ``load`` is what ``--load`` named, of which it may go on."""

    output: Path
    load: Path | None = None
    run: str | None = None
    """the run's identity"""
    config: Mapping[str, Any] | None = None
    """how it is configured, as plain values"""
    keep_last: int | None = None
    """how many of the newest to keep beside the newest good one and the best one; all where it is None"""
    save_async: bool = False
    """whether a save goes on beside the steps, until :meth:`settle`"""
    loaded: Path | None = None
    """the checkpoint that the run goes on from"""
    good_step: int | None = None
    """the newest checkpoint that was saved of a good step: what :meth:`go_back` goes back to"""
    best_step: int | None = None
    """the checkpoint that does best on what is held out"""
    _under_way: _UnderWay | None = None

    @property
    def newest(self) -> Path:
        """The newest one in the run's folder; of a run that has played no step there, the one it goes on from."""
        folder = latest(self.output / CHECKPOINTS) or self.loaded
        assert folder is not None, "a run at its end has saved, or goes on from one that had"
        return folder

    def save(
        self,
        stage: Stage,
        step: int,
        *,
        seed: int,
        good: bool,
        best: bool = False,
        idle: Mapping[str, Any] | None = None,
    ) -> Path:
        """Everything that going on after ``step`` steps needs; all ranks together. Returns the checkpoint's folder.

        It is there on return, or with ``save_async`` after :meth:`settle`, which is called here first: one at a time.
        ``good`` and ``best`` are those of the step's outcome, ``idle`` the run's counts of steps that taught nothing.
        Raises DiskError where there is no room for it.
        """
        self.settle()
        folder = step_folder(self.output / CHECKPOINTS, step)
        state = {
            "step": step,
            "seed": seed,
            "stage": stage.name,
            "good_step": step if good else self.good_step,
            "best_step": step if best else self.best_step,
            "kept": stage.state(),
            "run": self.run,
            "config": self.config,
            "data": stage.identity,
            "idle": idle or {},
        }
        saving = checkpoint.begin(folder, stage.engines(), state, models=stage.models, aside=self.save_async)
        self._under_way = _UnderWay(saving, step, good, best)
        if not self.save_async:
            self.settle()
        return folder

    @property
    def under_way(self) -> Path | None:
        """The checkpoint that is written beside the steps, the same on every rank."""
        return None if self._under_way is None else self._under_way.saving.folder

    def poll(self) -> Path | None:
        """:meth:`settle` if that would not have to wait. All ranks together, once a step."""
        if self._under_way is None or not self._under_way.saving.is_written():
            return None
        return self.settle()

    def settle(self) -> Path | None:
        """Wait until the save under way, if any, is committed, and return its folder. All ranks together.

        Raises DiskError where the disk filled up, and CheckpointError for whatever else kept it from being written.
        """
        if self._under_way is None:
            return None
        done, self._under_way = self._under_way, None
        done.saving.finish()
        if done.good:
            self.good_step = done.step
        if done.best:
            self.best_step = done.step
        if self.keep_last is not None:
            on_main(self._remove_older)
        return done.saving.folder

    def abandon(self) -> None:
        """Leave a save that a failed run has under way; each rank for itself. Older checkpoints stay the newest."""
        if self._under_way is not None:
            self._under_way.saving.abandon()
            self._under_way = None

    def restore(
        self,
        stage: Stage,
        saved: SavedRun,
        *,
        seed: int,
        change: Collection[str] = (),
        say: Callable[[str], None] = lambda _line: None,
    ) -> int:
        """Load the stage from ``saved``, on all ranks together; the step to go on with.

        ``change`` are the flags that the run may go on with other values of; ``say`` is told what that does to its
        data. Raises CheckpointError for a checkpoint
        that is past the last step, of other data or another seed (what is to come would not be that of an uninterrupted
        run), or whose state is damaged.
        """
        folder, state = saved.folder, saved.state
        if state["step"] > stage.total_steps:
            raise CheckpointError(f"{folder} is past --steps {stage.total_steps}; ask for at least {state['step']}")
        changed = set(map(changeable, change))
        if state["seed"] != seed and "seed" not in changed:
            raise CheckpointError(f"{folder} belongs to --seed {state['seed']}, this run has --seed {seed}")
        if state["data"] is not None:
            _check_data(folder, state["data"], stage, may_change=bool(changed & _DATA_FLAGS), say=say)
        self.loaded = folder
        checkpoint.load(folder, stage.engines())
        try:
            stage.restore(state["kept"])
            self.good_step, self.best_step = state["good_step"], state["best_step"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"what {folder} keeps of the run is damaged, or of another version ({error!r}); load another step"
            ) from error
        return int(state["step"])

    def go_back(self, engines: Mapping[str, MegatronEngine]) -> Path:
        """Load the newest good checkpoint, which the run that this one goes on from may have saved.

        One that is being written is waited for. All ranks together. Raises CheckpointError where it is gone.
        """
        self.settle()
        assert self.good_step is not None, "a run that may go back saves its start"
        load = self.load
        roots = [self.output / CHECKPOINTS, *([] if load is None else [load / CHECKPOINTS, load, load.parent])]
        folders = [step_folder(root, self.good_step) for root in roots]
        found = broadcast_object([folder.is_dir() for folder in folders], source=0)
        if not any(found):
            raise CheckpointError(
                f"{folders[0]}, which a rollback goes back to, is gone; keep it or leave --rollbacks out"
            )
        folder = folders[found.index(True)]
        checkpoint.load(folder, engines)
        return folder

    def _remove_older(self) -> None:
        """Keep the newest, the good one and the best one. A kill in between leaves more than that, never fewer."""
        assert self.keep_last is not None
        root = self.output / CHECKPOINTS
        complete = sorted(path.parent for path in root.glob(f"step_*/{STATE_FILE}"))
        spared = {*complete[-self.keep_last :]}
        spared |= {step_folder(root, step) for step in (self.good_step, self.best_step) if step is not None}
        with writing(root):
            for left_by_a_kill in root.glob(f".*{_REMOVED}"):
                shutil.rmtree(left_by_a_kill)
            for folder in complete:
                if folder not in spared:
                    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}{_REMOVED}")))


def _check_data(
    folder: Path, before: Mapping[str, Any], stage: Stage, *, may_change: bool, say: Callable[[str], None]
) -> None:
    try:
        words = what_differs(before, stage.identity)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"what {folder} says of its data is damaged ({error!r}); load another step") from error
    if words is None:
        return
    flag = stage.identity["flag"]
    if may_change:
        say(f"--{flag} is not what {folder} was trained on: {words}")
    else:
        raise CheckpointError(
            f"--{flag} is not what {folder} was trained on: {words}; give the run its data back, or ask for the change "
            f"by --change {flag}"
        )
