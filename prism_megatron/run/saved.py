"""What a checkpoint says of the run that saved it: who it is, how it was configured, what it trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from prism_megatron.config.merge import merge
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.conversion.checkpoints.folder import read_state
from prism_megatron.errors import CheckpointError, ConfigError
from prism_megatron.run.files import CONFIG
from prism_megatron.run.folder import run_of

ConfigT = TypeVar("ConfigT")

_TODAY = {"step", "seed", "stage", "good_step", "best_step", "kept", "run", "config", "data", "idle"}
_BEFORE_RUNS_HAD_NAMES: Mapping[str, Any] = {
    "best_step": None, "run": None, "config": None, "data": None, "idle": {},
}  # fmt: skip
_NEVER_GO_BACK = ("sft", "rlvr")
_TYPES: Mapping[str, type | UnionType] = {
    "step": int, "seed": int, "stage": str, "good_step": int | None, "best_step": int | None, "kept": dict,
    "run": str | None, "config": dict | None, "data": dict | None, "idle": dict,
}  # fmt: skip


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of training, without its tensors. ``state`` is what ``Checkpoints.save`` wrote."""

    folder: Path
    state: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, *, stage: str) -> SavedRun:
        """Raises CheckpointError for a damaged one, one that no run saved, and one of another ``stage``."""
        try:
            state = as_written_today(read_state(folder)["state"], folder)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"what {folder} keeps of the run is damaged ({error!r}); remove it") from error
        for name, kind in _TYPES.items():
            if not isinstance(state[name], kind):
                raise CheckpointError(f"{folder} is damaged: its {name} is {state[name]!r}; remove it")
        if state["stage"] != stage:
            raise CheckpointError(
                f"{folder} was saved by a run of {state['stage']}, and this is one of {stage}; to begin with its "
                "weights, name it with --model or --discriminator"
            )
        return cls(folder, state)

    @property
    def run(self) -> str | None:
        """The identity of the run; None where a version saved it that gave none."""
        name: str | None = self.state["run"]
        return name

    def config(self, fresh: ConfigT) -> ConfigT | None:
        """How it was configured, over the field defaults ``fresh``; None where that is written nowhere.

        Raises CheckpointError for a configuration that this version does not know.
        """
        written: Mapping[str, Any] | None = self.state["config"]
        beside = run_of(self.folder)
        if written is None and beside is not None and (beside / CONFIG).is_file():
            written = read_yaml(beside / CONFIG)
        if written is None:
            return None
        try:
            return merge(fresh, written)
        except ConfigError as error:
            raise CheckpointError(
                f"the configuration that {self.folder} was saved with cannot be read: {error}"
            ) from error


def as_written_today(state: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A checkpoint's state in the form of ``Checkpoints.save``, also where version 0.1.0 wrote it.

    Raises CheckpointError for a state that no run wrote.
    """
    if state.keys() >= _TODAY:
        return state
    if state.keys() >= _TODAY - {"best_step"}:  # its good step was the best one, where nothing goes back to a good one
        return {**state, "best_step": state["good_step"] if state["stage"] in _NEVER_GO_BACK else None}
    if state.keys() >= _TODAY - _BEFORE_RUNS_HAD_NAMES.keys():
        return {**state, **_BEFORE_RUNS_HAD_NAMES}
    if {"step", "seed", "game"} <= state.keys():  # an alignment of 0.1.0
        game = state["game"]
        kept = {**game["memory"], "probe": game["probe"]}
        return {**state, "stage": "align", "good_step": game["good_step"], "kept": kept, **_BEFORE_RUNS_HAD_NAMES}
    if {"step", "seed", "stage"} <= state.keys():  # a warm-start of 0.1.0
        return {**state, "good_step": None, "kept": {}, **_BEFORE_RUNS_HAD_NAMES}
    raise CheckpointError(
        f"{folder} was not saved by a run (it holds {sorted(state) or 'weights alone'}); to begin with its weights, "
        "name it with --model or --discriminator"
    )
