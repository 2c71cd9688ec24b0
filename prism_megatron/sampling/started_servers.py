"""SGLang servers that a run starts: on every host its own, by one rank there, and known to all ranks."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prism_megatron.config.architecture.qwen3_vl import max_positions
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.conversion.hf.files import member, read_object
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError, PrismError, RolloutError
from prism_megatron.parallel.collectives import all_gather_objects, broadcast_object, shared_store
from prism_megatron.rollout.sglang.arguments import HOST, ServerOptions
from prism_megatron.rollout.sglang.board import Board
from prism_megatron.rollout.sglang.restarts import Restarts
from prism_megatron.rollout.sglang.server import SGLangServers
from prism_megatron.sampling.hosts import Host, address_of

_SPARE_TOKENS = 16  # SGLang keeps a few of a context to itself


@dataclass(frozen=True)
class Started:
    """A run's servers, seen from one rank."""

    urls: Sequence[str]
    """of all hosts"""
    near: Sequence[str]
    """of this host"""
    api_key: str
    servers: SGLangServers | None
    """those of this host, on the rank that started and supervises them"""
    board: Board | None
    """where supervisors of several processes are spoken to"""


@dataclass(frozen=True)
class _Report:
    """What a rank says of the servers of its host."""

    host: int
    address: str
    urls: Sequence[str] = ()
    problem: str | None = None


def start_servers(
    wanted: RolloutConfig, data: DataConfig, folder: Path, *, world: World, dtype: torch.dtype, logs: Path
) -> Started:
    """Have the first rank of each host start its servers; all ranks call it together.

    Raises RolloutError on every rank, and leaves no server, where those of any host do not start.
    """
    key, name = broadcast_object((secrets.token_hex(32), secrets.token_hex(8)), source=0)
    board = Board(shared_store(f"rollout servers {name}")) if world.world_size > 1 else None
    servers: SGLangServers | None = None
    report = _Report(0, HOST)
    try:
        host = Host.of(world.rank, world.world_size)
        address = address_of(host, wanted.rollout_interface)
        report = _Report(host.number, address)
        if host.leads:
            options = server_options(wanted, data, folder, host=host, address=address, dtype=dtype, logs=logs)
            restarts = Restarts(wanted.rollout_restarts_per_hour)
            servers = SGLangServers(options, count=wanted.rollout_servers, api_key=key, restarts=restarts, board=board)
            servers.start()
            report = _Report(host.number, address, servers.urls)
    except PrismError as error:
        report = _Report(report.host, report.address, problem=str(error))
    reports = all_gather_objects(report)
    problem = next((f"{_on_host(one, reports)}{one.problem}" for one in reports if one.problem is not None), None)
    if problem is not None:
        if servers is not None:
            servers.stop()
        raise RolloutError(problem)
    return Started(
        urls=tuple(url for one in reports for url in one.urls),
        near=tuple(url for one in reports for url in one.urls if one.host == report.host),
        api_key=key,
        servers=servers,
        board=board,
    )


def _on_host(report: _Report, reports: Sequence[_Report]) -> str:
    """Which host a problem is of, where there are several."""
    return f"on host {report.host} ({report.address}): " if len({one.host for one in reports}) > 1 else ""


def server_options(
    wanted: RolloutConfig,
    data: DataConfig,
    folder: Path,
    *,
    host: Host,
    address: str,
    dtype: torch.dtype,
    logs: Path,
) -> ServerOptions:
    """Servers with room for the rollouts of all steps under way, shared evenly among those of all hosts.

    Raises ConfigError where this host has too few GPUs for them.
    """
    cuda = torch.cuda.is_available()
    first_gpu = 0
    if cuda:
        first_gpu = first_server_gpu(wanted, ranks=host.num_ranks, num_gpus=torch.cuda.device_count())
    path = member(folder, "config.json")
    wanted_tokens = data.max_prompt_tokens + data.max_response_tokens + _SPARE_TOKENS
    context = min(max_positions(read_object(path), str(path)) or wanted_tokens, wanted_tokens)
    prompts = wanted.prompts_per_step * (1 + wanted.rollout_ahead)
    requests = -(-prompts // (wanted.rollout_servers * host.count)) * wanted.rollouts_per_prompt
    return ServerOptions(
        model=folder,
        # All hosts see one folder of the run.
        logs=logs if host.count == 1 else logs / f"host-{host.number}",
        python=wanted.rollout_python,
        dtype=str(dtype).removeprefix("torch."),
        tp=wanted.rollout_tp,
        first_gpu=first_gpu,
        memory_fraction=wanted.rollout_memory_fraction,
        releases_memory=wanted.rollout_colocated,
        context_length=context,
        # With CUDA, SGLang fills what the memory holds; without, it would take most of the machine's.
        max_total_tokens=None if cuda else requests * context,
        max_running_requests=requests,
        start_seconds=60.0 * wanted.rollout_start_minutes,
        host=address,
    )


def first_server_gpu(wanted: RolloutConfig, *, ranks: int, num_gpus: int) -> int:
    """Device number of the first GPU for servers: behind the trainer's ``ranks``, or the first one if colocated.

    Raises ConfigError where this host has too few.
    """
    first = 0 if wanted.rollout_colocated else ranks
    needed = first + wanted.rollout_servers * wanted.rollout_tp
    if needed > num_gpus:
        training = "" if wanted.rollout_colocated else f", behind the {ranks} of the trainer,"
        raise ConfigError(
            f"--rollout-servers {wanted.rollout_servers} --rollout-tp {wanted.rollout_tp}{training} take {needed} "
            f"GPUs, and this host has {num_gpus}; use fewer, or share the trainer's with --rollout-colocated"
        )
    return first
