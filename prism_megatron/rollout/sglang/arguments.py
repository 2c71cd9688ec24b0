"""What an SGLang server is started with: its arguments, its GPUs and the variables of its process.

Where CUDA is absent it gets the arguments of a CPU server and, on its own PYTHONPATH, the two stand-ins in
``cpu_stand_ins/``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.temporary import folder_for_sockets

PYTHON = Path(".venv-sglang/bin/python")
"""Where ``make sglang`` puts SGLang's interpreter, from the root of the checkout."""

HOST = "127.0.0.1"
"""Where servers listen that nobody of another host must reach."""

Argument = str | int | float | bool
_CPU_STAND_INS = Path(__file__).resolve().parent / "cpu_stand_ins"
_OWN_VARIABLES = ("PYTHON", "TORCHELASTIC_", "VIRTUAL_ENV")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # the first image would compile for 20 s
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(_CPU_STAND_INS),
}
_CPU_ARGUMENTS: dict[str, Argument] = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "sleep-on-idle": True,  # an idle scheduler would spin on a core
}


@dataclass(frozen=True)
class ServerOptions:
    """What a server serves and how much of it at once."""

    model: Path
    """Hugging Face folder of the model and its tokenizer"""
    logs: Path
    """folder for each server's log and its file of arguments"""
    python: Path = PYTHON
    """interpreter that has sglang"""
    dtype: str = "bfloat16"
    """type of weights and key/value store, as torch spells it"""
    tp: int = 1
    """GPUs, or without CUDA processes, that share one server's model"""
    first_gpu: int = 0
    """CUDA device number of the first server's first GPU; the servers' GPUs follow one another"""
    memory_fraction: float | None = None
    """share of a GPU's memory for weights, keys and values; None lets SGLang choose"""
    releases_memory: bool = False
    """whether the server can release its GPU memory on request"""
    context_length: int = 4096
    """most tokens of a prompt and its response together"""
    max_total_tokens: int | None = None
    """tokens that the key/value store holds; None lets SGLang fill the memory"""
    max_running_requests: int | None = None
    """sequences decoded at once; None lets SGLang choose"""
    start_seconds: float = 1200.0
    """how long a server may take to become healthy"""
    host: str = HOST
    """address of this host at which the server listens"""
    poll_seconds: float = 0.2
    """how often a server is looked at, while it starts and afterwards"""
    port: int | None = None
    """of the one server there is then; None takes a free one for each"""
    name: str | None = None
    """the model's name in OpenAI-compatible requests; None lets SGLang take the folder's"""


def server_arguments(options: ServerOptions, *, index: int, port: int, cuda: bool) -> dict[str, Argument]:
    """The arguments of server number ``index`` by their long names, without the key."""
    asked: dict[str, Argument | None] = {
        "max-total-tokens": options.max_total_tokens,
        "max-running-requests": options.max_running_requests,
        "mem-fraction-static": options.memory_fraction,
        "served-model-name": options.name,
    }
    arguments: dict[str, Argument] = {
        "model-path": str(options.model.resolve()),
        "host": options.host,
        "port": port,
        "dtype": options.dtype,
        "tp-size": options.tp,
        "context-length": options.context_length,
        "skip-server-warmup": True,
        **{name: value for name, value in asked.items() if value is not None},
    }
    if not cuda:
        return arguments | _CPU_ARGUMENTS
    if options.releases_memory:
        arguments["enable-memory-saver"] = True
    return arguments | {"base-gpu-id": options.first_gpu + index * options.tp}


def server_environment(environment: Mapping[str, str], *, tp: int, cuda: bool) -> dict[str, str]:
    """The variables of a server's process: without this process's Python and its place in a world of ranks."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _RANK_VARIABLES and not name.startswith(_OWN_VARIABLES)
    }
    # The cache of image features is cleared neither by a weight update nor by /flush_cache.
    kept |= {"SGLANG_VLM_CACHE_SIZE_MB": "0", "HF_HUB_OFFLINE": "1"}
    # Its processes meet through sockets among its temporary files.
    kept["TMPDIR"] = str(folder_for_sockets())
    if cuda:
        return kept
    if tp > 1:
        kept["SGLANG_CPU_OMP_THREADS_BIND"] = _cores_of_ranks(tp)
    return kept | _CPU_ENVIRONMENT


def _cores_of_ranks(tp: int) -> str:
    """One core for each rank in turn, as ``0|1``; SGLang asks for them where there are more ranks than NUMA nodes."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(tp))
