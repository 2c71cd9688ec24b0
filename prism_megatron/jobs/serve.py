"""Serves a model with SGLang, as an OpenAI-compatible endpoint on loopback."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape, max_positions
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.tools.convert import ToHFConfig
from prism_megatron.config.tools.serve import ServeConfig, check_serve
from prism_megatron.conversion.checkpoints.folder import is_checkpoint, read_state
from prism_megatron.conversion.checkpoints.model_names import folder_of, short_name
from prism_megatron.conversion.expert_layout import detect_expert_layout
from prism_megatron.conversion.hf.files import member, read_object
from prism_megatron.conversion.hf.quantised import QUANT_CONFIG
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.data.reading.model_files import check_model_files
from prism_megatron.errors import ConfigError
from prism_megatron.jobs.convert import to_hf
from prism_megatron.jobs.model_folder import check_model_folder
from prism_megatron.jobs.served_prompt import with_system_prompt
from prism_megatron.rollout.sglang.arguments import HOST, ServerOptions
from prism_megatron.rollout.sglang.server import SGLangServers

API_KEY = "PRISM_SERVE_API_KEY"
"""Variable with the endpoint's key; without it a random one is made and printed."""

_CONTEXTS_WITHOUT_CUDA = 2
_POLL_SECONDS = 1.0

Say = Callable[[str], None]


def serve(config: ServeConfig, *, say: Say, stop: threading.Event) -> None:
    """Serve until ``stop`` is set. A checkpoint's policy is converted first, and that folder removed at the end.

    A server that dies is started again, a few times. Raises ConfigError for a port that is taken, a name that stands
    for no policy, or where SGLang is missing; ConversionError or CheckpointError for a damaged folder; RolloutError
    when the server fails; DataError where --system-prompt finds no chat template.
    """
    load = check_serve(config)
    _check_port(config.port)
    named = folder_of(load, "policy", flag="--load", fetch=True)
    with _model_folder(named, config.logs, say) as folder, _prompting(folder, config) as served:
        shape = Qwen3VLShape.from_folder(folder)
        # Weights that ModelOpt quantised are read by the server alone.
        if (folder / QUANT_CONFIG).exists():
            check_model_files(folder, shape)
        else:
            check_model_folder(folder)
        if detect_expert_layout(HFFolder(folder), shape) == "transformers":
            raise ConfigError(
                f"--load {load} fuses experts as transformers 5 does, which SGLang misreads; write it with experts one "
                "by one (prism-convert to-hf --expert-layout per_expert)"
            )
        context_length = config.context_length or default_context(folder)
        total = config.max_total_tokens
        if total is None and not torch.cuda.is_available():
            total = _CONTEXTS_WITHOUT_CUDA * context_length
        options = ServerOptions(
            model=served,
            logs=config.logs,
            python=config.sglang_python,
            dtype=shape.dtype,
            tp=config.tp,
            context_length=context_length,
            max_total_tokens=total,
            port=config.port,
            name=config.name or short_name(load),
        )
        key = os.environ.get(API_KEY) or secrets.token_hex(32)
        servers = SGLangServers(options, count=1, api_key=key)
        say(f"starting SGLang on {load}; its log is {servers.servers[0].log}")
        servers.start()
        try:
            say(f"serving {options.name!r} at {servers.urls[0]}/v1")
            say(f"API key: {f'that of {API_KEY}' if API_KEY in os.environ else key}")
            while not stop.wait(_POLL_SECONDS):
                servers.supervises(servers.urls[0])  # raises once it is started no more
        finally:
            servers.stop()


def default_context(folder: Path) -> int:
    """Room for the longest prompt and response of training's defaults, or what the config allows where that is less.

    Published models allow 262144 tokens, whose keys and values few hosts hold.
    """
    trained = DataConfig().max_prompt_tokens + DataConfig().max_response_tokens
    path = member(folder, "config.json")
    allowed = max_positions(read_object(path), str(path))
    return trained if allowed is None else min(trained, allowed)


@contextmanager
def _model_folder(load: Path, logs: Path, say: Say) -> Iterator[Path]:
    """``load`` itself, or the Hugging Face folder of a checkpoint's policy for as long as it is needed.

    Its experts are written one by one, which SGLang reads from whatever layout they came in.
    """
    if not is_checkpoint(load):
        yield load
        return
    logs.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix="model-", dir=logs))
    try:
        folder = aside / load.resolve().name
        held = read_state(load)["models"].get("policy", {}).get("expert_layout")
        layout: Literal["as-it-came", "per_expert"] = "as-it-came" if held is None else "per_expert"
        to_hf(ToHFConfig(load=str(load), save=str(folder), role="policy", expert_layout=layout), say=say)
        yield folder
    finally:
        shutil.rmtree(aside)


@contextmanager
def _prompting(folder: Path, config: ServeConfig) -> Iterator[Path]:
    """``folder`` itself, or one beside it in the logs whose chat template brings --system-prompt."""
    prompt = config.default_message
    if prompt is None:
        yield folder
        return
    config.logs.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix="prompting-", dir=config.logs))
    try:
        with_system_prompt(folder, aside / folder.resolve().name, prompt)
        yield aside / folder.resolve().name
    finally:
        shutil.rmtree(aside)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, after one that has just ended
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"--port {port} cannot be used on {HOST} ({error.strerror}); choose another") from error
