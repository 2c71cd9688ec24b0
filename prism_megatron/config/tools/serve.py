"""The configuration of ``prism-serve``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prism_megatron.config.fields import AT_LEAST_ONE, Range, check_fields
from prism_megatron.config.stages.data import STRUCTURED_SYSTEM_PROMPT
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class ServeConfig:
    """An OpenAI-compatible endpoint of a model, on loopback."""

    load: str | None = None
    """a Qwen3-VL: run folder, checkpoint (of training or converted), model folder or hub id (org/name@revision)"""
    name: str | None = None
    """the model's name in requests; by default the last part of --load"""
    port: Annotated[int, Range(at_least=1, at_most=65535)] = 30000
    """port on 127.0.0.1"""
    system_prompt: str | None = None
    """system message for requests that bring none, from clients that cannot send one; the word training stands for that
    which training asks with by default"""
    tp: Annotated[int, AT_LEAST_ONE] = 1
    """GPUs that share the model"""
    context_length: Annotated[int | None, AT_LEAST_ONE] = None
    """most tokens of a prompt and its response together; by default as many as training allows by default, or the
    model's own limit where that is lower"""
    max_total_tokens: Annotated[int | None, AT_LEAST_ONE] = None
    """tokens that the key/value store holds; by default what the memory holds with CUDA, else two contexts"""
    sglang_python: Path = Path(".venv-sglang/bin/python")
    """interpreter that has sglang; make sglang sets this one up"""
    logs: Path = Path("runs/serve")
    """folder for the server's log, and for the Hugging Face folder that a checkpoint becomes while it is served"""

    @property
    def default_message(self) -> str | None:
        """What --system-prompt stands for."""
        return STRUCTURED_SYSTEM_PROMPT if self.system_prompt == "training" else self.system_prompt


def check_serve(config: ServeConfig) -> str:
    """The name of what to serve. Raises ConfigError, naming the flag, for what no model could make work."""
    if config.load is None:
        raise ConfigError("name what to serve: --load MODEL, a run folder, a checkpoint, a model folder or a hub id")
    check_fields(config)
    if config.system_prompt is not None and not config.system_prompt.strip():
        raise ConfigError("--system-prompt is empty; name a text, or leave it out for none")
    return config.load
