"""A run's checkpoints: saving, going on, going back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.conversion.checkpoint_folder import read_state
from prism_megatron.engine import checkpoint
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.errors import CheckpointError
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.run.files import CHECKPOINTS, CONFIG
from prism_megatron.run.stage import Stage


def checkpoint_to_load(root: Path | None, output: Path) -> Path | None:
    """The checkpoint that ``--load`` means; None for a new run, and for one killed before its first checkpoint.

    Raises CheckpointError when ``root`` is neither a checkpoint nor a run folder, or when ``output`` holds newer
    checkpoints, which would be mixed with this run's.
    """
    if root is None:
        return None
    folder = broadcast_object(checkpoint.latest(root) or checkpoint.latest(root / CHECKPOINTS), source=0)
    if folder is None:
        if not (root / CONFIG).is_file():
            raise CheckpointError(f"--load {root} is neither a run folder nor a checkpoint; give one of those")
        return None
    newest = broadcast_object(checkpoint.latest(output / CHECKPOINTS), source=0)
    if newest is not None and newest.name > folder.name:
        raise CheckpointError(f"{newest} is newer than --load {folder}; remove it, or give another --output")
    return folder


@dataclass(eq=False)
class Checkpoints:
    """Those of one run, in its folder ``output``; ``load`` is what ``--load`` named, of which it may go on."""

    output: Path
    load: Path | None = None
    good_step: int | None = None
    """the newest checkpoint that was saved of a good step: what :meth:`go_back` goes back to"""

    def save(self, stage: Stage, step: int, *, seed: int, good: bool) -> Path:
        """Everything that going on after ``step`` steps needs; all ranks together. Returns the checkpoint's folder."""
        if good:
            self.good_step = step
        folder = checkpoint.step_folder(self.output / CHECKPOINTS, step)
        state = {
            "step": step,
            "seed": seed,
            "stage": stage.name,
            "good_step": self.good_step,
            "kept": stage.state(),
        }
        checkpoint.save(folder, stage.engines(), state, models=stage.models)
        return folder

    def restore(self, stage: Stage, folder: Path, *, seed: int) -> int:
        """Load the stage from ``folder``, on all ranks together; the step to go on with.

        Raises CheckpointError for a checkpoint of another stage, that is past the last step, of another seed (its data
        and samples would not be those of an uninterrupted run), or whose state is damaged.
        """
        state = as_written_today(read_state(folder)["state"], folder)
        if state["stage"] != stage.name:
            raise CheckpointError(
                f"{folder} was saved by a run of {state['stage']}, and this is one of {stage.name}; to begin with its "
                "weights, name it with --model or --discriminator"
            )
        if state["step"] > stage.total_steps:
            raise CheckpointError(f"{folder} is past --steps {stage.total_steps}; ask for at least {state['step']}")
        if state["seed"] != seed:
            raise CheckpointError(f"{folder} belongs to --seed {state['seed']}, this run has --seed {seed}")
        checkpoint.load(folder, stage.engines())
        try:
            stage.restore(state["kept"])
            self.good_step = state["good_step"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"what {folder} keeps of the run is damaged, or of another version ({error!r}); load another step"
            ) from error
        return int(state["step"])

    def go_back(self, engines: Mapping[str, MegatronEngine]) -> Path:
        """Load the newest good checkpoint, which the run that this one goes on from may have saved.

        All ranks together. Raises CheckpointError where it is gone.
        """
        assert self.good_step is not None, "a run that may go back saves its start"
        load = self.load
        roots = [self.output / CHECKPOINTS, *([] if load is None else [load / CHECKPOINTS, load, load.parent])]
        folders = [checkpoint.step_folder(root, self.good_step) for root in roots]
        found = broadcast_object([folder.is_dir() for folder in folders], source=0)
        if not any(found):
            raise CheckpointError(
                f"{folders[0]}, which a rollback goes back to, is gone; keep it or leave --rollbacks out"
            )
        folder = folders[found.index(True)]
        checkpoint.load(folder, engines)
        return folder


def as_written_today(state: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A checkpoint's state in the form of :meth:`Checkpoints.save`, also where version 0.1.0 wrote it.

    Raises CheckpointError for a state that no run wrote.
    """
    if {"step", "seed", "stage", "good_step", "kept"} <= state.keys():
        return state
    if {"step", "seed", "game"} <= state.keys():  # an alignment of 0.1.0
        game = state["game"]
        kept = {**game["memory"], "probe": game["probe"]}
        return {**state, "stage": "align", "good_step": game["good_step"], "kept": kept}
    if {"step", "seed", "stage"} <= state.keys():  # a warm-start of 0.1.0
        return {**state, "good_step": None, "kept": {}}
    raise CheckpointError(
        f"{folder} was not saved by a run (it holds {sorted(state) or 'weights alone'}); to begin with its weights, "
        "name it with --model or --discriminator"
    )
