"""The configuration of ``tools/serve.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class ServeConfig:
    """An OpenAI-compatible endpoint of a model, on loopback."""

    load: str | None = None
    """checkpoint folder, of training or converted, or Hugging Face folder of a Qwen3-VL"""
    name: str | None = None
    """the model's name in requests; by default that of the folder"""
    port: int = 30000
    """port on 127.0.0.1"""
    tp: int = 1
    """GPUs that share the model"""
    context_length: int = 4096
    """most tokens of a prompt and its response together"""
    max_total_tokens: int | None = None
    """tokens that the key/value store holds; by default what the memory holds with CUDA, else two contexts"""
    sglang_python: Path = Path(".venv-sglang/bin/python")
    """interpreter that has sglang; make sglang sets this one up"""
    logs: Path = Path("runs/serve")
    """folder for the server's log, and for the Hugging Face folder that a checkpoint becomes while it is served"""


def check_serve(config: ServeConfig) -> Path:
    """The folder to serve. Raises ConfigError, naming the flag, for what no model could make work."""
    if config.load is None or not Path(config.load).is_dir():
        raise ConfigError(f"--load {config.load} is not a folder; name a checkpoint or a Hugging Face model folder")
    if not 0 < config.port < 2**16:
        raise ConfigError(f"--port {config.port} is no port; use one from 1 to 65535")
    counts = {
        "--tp": config.tp,
        "--context-length": config.context_length,
        "--max-total-tokens": config.max_total_tokens,
    }
    for flag, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{flag} {count} must be at least 1")
    return Path(config.load)
