"""What is checked of servers before anything is asked of them: reachable, the right key, the policy's model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.errors import RolloutError
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.weight_checks import TIED_NAME

_LAYER = re.compile(r"(visual\.blocks|(?<!visual\.)layers)\.(\d+)\.")


@dataclass(frozen=True)
class ServedModel:
    """What servers must serve: the model of ``folder``, whose weights have ``names``."""

    folder: Path
    model_type: str
    names: tuple[str, ...]


def attach(client: ServerClient, model: ServedModel, *, colocated: bool, over_http: bool) -> int:
    """Most tokens that the server takes, prompt and response together.

    Raises RolloutError for a server that cannot be reached, refuses the key or serves another model, and for a
    ``colocated`` one that was not started to release its memory. Weights ``over_http`` reach one worker a server.
    """
    info = client.get("/model_info", seconds=client.patience.attach)
    names = client.post_again("/weights_checker", {"action": "checksum"})["ranks"][0]["checksums"]
    ours = (model.model_type, _num_layers(name for name in model.names if name != TIED_NAME))
    theirs = (info["model_type"], _num_layers(names))
    if ours != theirs:
        raise RolloutError(
            f"{client.url} serves another model ({info['model_path']}: {_described(*theirs)}) than {model.folder} "
            f"({_described(*ours)}); start it with the policy's folder"
        )
    server: dict[str, Any] = client.get("/server_info")
    if colocated and not server.get("enable_memory_saver", False):
        raise RolloutError(
            f"{client.url} cannot release its memory; start it with --enable-memory-saver, or leave "
            "--rollout-colocated out"
        )
    if over_http and int(server["tp_size"]) > 1:
        raise RolloutError(
            f"{client.url} has {server['tp_size']} workers, and --rollout-sync tensor would send all weights to each; "
            "use --rollout-sync disk or group"
        )
    return int(server["context_length"])


def attach_router(router: ServerClient) -> None:
    """Raises RolloutError for a router that does not answer or has no worker that does."""
    if not router.is_ready("/readiness"):
        raise RolloutError(
            f"--rollout-router {router.url} does not answer, or has no healthy worker; is it running there, with the "
            "servers of --rollout-urls as its workers?"
        )


def _num_layers(names: Iterable[str]) -> tuple[int, int]:
    """Layers of the language model and blocks of the vision tower, out of the names of weights."""
    found = {match.groups() for name in names if (match := _LAYER.search(name))}
    blocks = sum(kind == "visual.blocks" for kind, _ in found)
    return len(found) - blocks, blocks


def _described(model_type: str, layers: tuple[int, int]) -> str:
    return f"{model_type} of {layers[0]} layers and {layers[1]} vision blocks"
