"""From a model's name, as a user gives it, to the folder that it stands for: the one place where names are read.

A name is a model folder (``config.json``), a checkpoint (``state.json``), a run folder (``config.yaml``: its newest
complete checkpoint, or without one its ``hf/``), or, where no such folder is there, a hub id ``org/name@revision``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from prism_megatron.config.architecture.model import MiniWorld, ModelConfig
from prism_megatron.config.experiments.mini_world import mini_folder
from prism_megatron.config.stages.discriminator import SECTION
from prism_megatron.conversion.checkpoints.folder import CHECKPOINTS, EXPORT, is_checkpoint, is_run, latest, read_state
from prism_megatron.errors import ConfigError

Role = Literal["policy", "discriminator"]
MiniPolicy = Literal["base", "policy", "aligned"]
"""Of a world's shipped ones: before supervised fine-tuning, after it, and after alignment."""

FORMS = "a run folder, a checkpoint, a model folder or a hub id (org/name)"
READ_OF_A_REPOSITORY = ("*.safetensors", "*.json", "*.jinja", "*.txt")
"""Weights and their index, configs, tokenizer and chat template."""

_MODEL_CONFIG = "config.json"
_PATH_BEGINS_WITH = ("/", ".", "~")
_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|\.(?!\.)|-(?!-)){0,95}"
_REVISION = r"[A-Za-z0-9_](?:[A-Za-z0-9_/-]|\.(?!\.))*"
_HUB_ID = re.compile(rf"(?P<repository>{_HUB_PART}/{_HUB_PART})(?:@(?P<revision>{_REVISION}))?")


def policy_folder(
    model: str | None, *, of_the_mini: MiniPolicy = "policy", mini: MiniWorld = "habits", fetch: bool = False
) -> Path:
    """The folder of ``--model``, or without one of a policy of the mini's. Raises PrismError as ``folder_of``."""
    return mini_folder(mini) / of_the_mini if model is None else folder_of(model, "policy", flag="--model", fetch=fetch)


def upcycled_folder(mini: MiniWorld, *, scenes: bool) -> Path | None:
    """Whose weights a fresh discriminator of a mini world's ``scenes`` gets; None: those of the policy that plays.

    The counts of ``drift`` have moved in its policy, and a discriminator has to see them: it begins as the base.
    """
    return mini_folder(mini) / "base" if scenes and mini == "drift" else None


def discriminator_folder(discriminator: str | None, *, fetch: bool = False) -> Path | None:
    """The folder of ``--discriminator``; None where none is named. Raises PrismError as ``folder_of``."""
    if discriminator is None:
        return None
    return folder_of(discriminator, "discriminator", flag="--discriminator", fetch=fetch)


def folder_of(name: str, role: Role | None = None, *, flag: str, fetch: bool = False) -> Path:
    """The model folder or checkpoint that ``name`` stands for; ``role`` None takes whichever it holds.

    A hub id is read from the cache; with ``fetch`` what the cache lacks is downloaded, once and before any rank
    starts. Raises ConfigError, naming ``flag``, where the name stands for nothing that can be read or does not hold
    the role, and CheckpointError for a damaged checkpoint.
    """
    place = Path(name)
    if not name or not _is_folder(place):
        found = _snapshot(name, flag=flag, fetch=fetch)
    elif is_checkpoint(place) or _is_model(place):
        found = place
    elif is_run(place):
        found = _newest_of_run(place, flag=flag)
    else:
        raise ConfigError(
            f"{flag} {name} holds no model: no {_MODEL_CONFIG} (a model folder), no state.json (a checkpoint) and no "
            f"config.yaml (a run folder); give {FORMS}"
        )
    if role is not None:
        _check_role(found, role, f"{flag} {name}" + ("" if found == place else f" (read as {found})"))
    return found


def short_name(name: str) -> str:
    """What a reader may call the model: the last part of its name, without a revision."""
    hub_id = None if _is_folder(Path(name)) else _HUB_ID.fullmatch(name)
    return Path(name).resolve().name if hub_id is None else hub_id["repository"].partition("/")[2]


def title_of(model: ModelConfig) -> str:
    """What reports call the policy that a run begins with."""
    if model.model is not None:
        return short_name(model.model)
    return "the mini" if model.mini == ModelConfig().mini else f"the mini ({model.mini})"


def _is_folder(place: Path) -> bool:
    try:
        return place.is_dir()
    except OSError:  # such as a name that is too long
        return False


def _is_model(place: Path) -> bool:
    """Weights are enough for those that compare weights alone."""
    return (place / _MODEL_CONFIG).is_file() or any(place.glob("*.safetensors"))


def _newest_of_run(run: Path, *, flag: str) -> Path:
    newest = latest(run / CHECKPOINTS)
    if newest is not None:
        return newest
    if (run / EXPORT / _MODEL_CONFIG).is_file():
        return run / EXPORT
    raise ConfigError(
        f"{flag} {run} is the folder of a run that has saved nothing: no complete {CHECKPOINTS}/step_* and no "
        f"{EXPORT}/; let it save first, or name another model"
    )


def _check_role(folder: Path, role: Role, named: str) -> None:
    """Raise ConfigError, which begins with what the user ``named``, where ``folder`` holds no such role."""
    if is_checkpoint(folder):
        held = sorted(read_state(folder)["models"])
        if role not in held:
            raise ConfigError(f"{named} holds {' and '.join(held) or 'no model'}, and no {role}; name one that does")
        return
    try:
        config = json.loads((folder / _MODEL_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{named}: {folder / _MODEL_CONFIG} cannot be read as JSON: {error}") from error
    is_discriminator = isinstance(config, dict) and SECTION in config
    if is_discriminator and role == "policy":
        raise ConfigError(f"{named} is a discriminator, which gives scores and no text; name a policy")
    if not is_discriminator and role == "discriminator":
        raise ConfigError(
            f"{named} is a policy: its {_MODEL_CONFIG} has no section {SECTION!r}; name a discriminator, or make "
            "one of it by `prism-convert to-megatron --as discriminator`"
        )


def _snapshot(name: str, *, flag: str, fetch: bool) -> Path:
    """Where the cache has the files of a hub id."""
    if name.startswith(_PATH_BEGINS_WITH) or name.partition("@")[0].count("/") > 1 or not name:
        raise ConfigError(f"{flag} {name} is not a folder; give {FORMS}")
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id is None:
        raise ConfigError(f"{flag} {name} is not a folder, and no hub id either (org/name or org/name@revision); give "
                          f"{FORMS}")  # fmt: skip
    # Here because it is slow to import, and rarely needed.
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError

    try:
        folder = snapshot_download(
            hub_id["repository"],
            revision=hub_id["revision"],
            allow_patterns=list(READ_OF_A_REPOSITORY),
            ignore_patterns=["*/*"],
            local_files_only=not fetch,
        )
    except (OSError, ValueError, httpx2.HTTPError, EntryNotFoundError, RevisionResolutionError) as error:
        raise ConfigError(
            f"{flag} {name} is not a folder, and as a hub id {_why_not(error, fetch=fetch)}; download it where that "
            "works, and name the folder"
        ) from error
    if not (Path(folder) / _MODEL_CONFIG).is_file():
        raise ConfigError(f"{flag} {name}: what the hub has under this id is no model ({_MODEL_CONFIG} is missing)")
    return Path(folder)


def _why_not(error: Exception, *, fetch: bool) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = error.__cause__ or error
    if isinstance(error, GatedRepoError):
        return "it is gated: its owner must let you in, and HF_TOKEN say who you are"
    if isinstance(error, RepositoryNotFoundError):
        return "it is unknown to the hub, or private (HF_TOKEN says who you are)"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, LocalEntryNotFoundError) and (not fetch or isinstance(cause, OfflineModeIsEnabled)):
        why = ", and HF_HUB_OFFLINE keeps it from being downloaded" if fetch else ""
        return f"it is not, or not whole, in this host's cache{why}"
    return f"it cannot be downloaded ({type(cause).__name__}: {next(iter(str(cause).splitlines()), 'no message')})"
