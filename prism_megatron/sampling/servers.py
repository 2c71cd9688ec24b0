"""SGLang servers for a whole world of ranks: the main rank starts them, or they are given by URL."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape, max_positions
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.conversion.checkpoints.folder import files_folder, is_checkpoint
from prism_megatron.conversion.expert_layout import detect_expert_layout
from prism_megatron.conversion.hf.block_fp8 import CONFIG_KEY
from prism_megatron.conversion.hf.files import member, read_object
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.conversion.hf.writer import write_hf_folder
from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.data.pictures.pixel_limits import check_served_limits
from prism_megatron.data.render import Renderer
from prism_megatron.engine.host.cached_memory import give_back
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError, PrismError, RolloutError
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.rollout.sglang.arguments import ServerOptions
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.restarts import Restarts
from prism_megatron.rollout.sglang.server import SGLangServers
from prism_megatron.rollout.weight_spool import remove_leftovers
from prism_megatron.sampling.replicas import end_token_ids
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.training.roles import weights_in_layout

API_KEY = "PRISM_ROLLOUT_API_KEY"
"""Variable with the key of servers given by URL."""

_FOLDER, _MODEL = "rollout", "model"
_SPARE_TOKENS = 16  # SGLang keeps a few of a context to itself


def build_served_rollout(
    wanted: RolloutConfig,
    data: DataConfig,
    source: Path,
    shape: Qwen3VLShape,
    renderer: Renderer,
    *,
    output: Path,
    world: World,
    dtype: torch.dtype,
) -> SharedRollout:
    """Servers of the policy, started by the main rank or given by URL, and a client on every rank.

    ``source`` is what the policy is loaded from: servers read a Hugging Face folder as it is. One is made, in the run's
    folder ``output``, of a checkpoint and of a folder that servers would not hold as the policy does. Raises
    ConfigError or RolloutError on every rank if servers cannot be started or used.
    """
    _check_devices(wanted, cuda=torch.cuda.is_available())
    if (data.min_pixels, data.max_pixels) != (None, None):
        check_served_limits(renderer.preprocessor, ImagePreprocessor.from_folder(files_folder(source, "policy")))
    num_hosts = world.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    check_sync(wanted, num_hosts=num_hosts)
    if world.is_main:
        remove_leftovers(output / _FOLDER)
    exported: Path | None = None
    if is_checkpoint(source) or not _is_served_as_it_is(source, shape):
        exported = output / _FOLDER / _MODEL
        if world.is_main:
            tensors = weights_in_layout(source, shape, SGLangRollout.expert_layout)
            named = ((name, tensor.to(dtype)) for name, tensor in tensors)
            write_hf_folder(exported, named, like=files_folder(source, "policy"), dtype=dtype)
        dist.barrier()
    folder = exported or source
    servers: SGLangServers | None = None
    problem: str | None = None
    if world.is_main and not wanted.rollout_urls:
        try:
            servers = _start(wanted, data, folder, world=world, dtype=dtype, logs=output / _FOLDER)
        except PrismError as error:
            problem = str(error)
    found = (servers.urls, servers.api_key) if servers is not None else (wanted.rollout_urls, os.environ.get(API_KEY))
    (urls, api_key), problem = broadcast_object((found, problem), source=0)
    if problem is not None:
        raise RolloutError(problem)
    first = world.rank % len(urls)  # ranks with one request each should not all ask the same server
    engine = SGLangRollout(
        folder,
        renderer.segment_finder,
        urls=(*urls[first:], *urls[:first]),
        api_key=api_key,
        end_token_ids=end_token_ids(folder, renderer),
        spool=output / _FOLDER,
        servers=servers,
        supervised_elsewhere=not world.is_main and not wanted.rollout_urls,
        options=SGLangOptions(
            transport=wanted.rollout_sync,
            bucket_bytes=wanted.rollout_bucket_mib * 2**20,
            master_address=wanted.rollout_master_address,
            spool_every=wanted.rollout_spool_every,
            seconds=60.0 * wanted.rollout_timeout_minutes,
            router=wanted.rollout_router,
            colocated=wanted.rollout_colocated,
        ),
    )
    shared = SharedRollout(engine, world, exported=exported, let_go=give_back if wanted.rollout_colocated else None)
    shared.sleep()  # colocated servers make room for the players until the first weights
    return shared


def _is_served_as_it_is(folder: Path, shape: Qwen3VLShape) -> bool:
    """Servers would keep quantised weights quantised, and take fused experts for those of the published order."""
    is_quantised = CONFIG_KEY in read_object(member(folder, "config.json"))
    return not is_quantised and detect_expert_layout(HFFolder(folder), shape) != "transformers"


def _start(
    wanted: RolloutConfig, data: DataConfig, folder: Path, *, world: World, dtype: torch.dtype, logs: Path
) -> SGLangServers:
    """Servers with room for the rollouts of all steps under way, shared evenly among them."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    if ranks_here != world.world_size:
        raise ConfigError(
            "--rollout sglang starts servers that only this host can reach, and the run spans several; start servers "
            "yourself and name them with --rollout-urls"
        )
    cuda = torch.cuda.is_available()
    first_gpu = 0
    if cuda:
        first_gpu = first_server_gpu(wanted, ranks=ranks_here, num_gpus=torch.cuda.device_count())
    path = member(folder, "config.json")
    wanted_tokens = data.max_prompt_tokens + data.max_response_tokens + _SPARE_TOKENS
    context = min(max_positions(read_object(path), str(path)) or wanted_tokens, wanted_tokens)
    prompts = wanted.prompts_per_step * (1 + wanted.rollout_ahead)
    requests = -(-prompts // wanted.rollout_servers) * wanted.rollouts_per_prompt
    options = ServerOptions(
        model=folder,
        logs=logs,
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
    )
    restarts = Restarts(wanted.rollout_restarts_per_hour)
    servers = SGLangServers(options, count=wanted.rollout_servers, restarts=restarts)
    servers.start()
    return servers


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


def check_sync(wanted: RolloutConfig, *, num_hosts: int) -> None:
    """Raise ConfigError for handles of GPU memory that would have to leave a host, and for weights that are not always
    written where no second server goes on for one that dies."""
    if wanted.rollout_sync == "ipc" and num_hosts > 1:
        raise ConfigError(
            f"--rollout-sync ipc: the run spans {num_hosts} hosts, and handles of GPU memory leave none; use "
            "--rollout-sync disk or group"
        )
    num_servers = len(wanted.rollout_urls) or wanted.rollout_servers * num_hosts
    if wanted.rollout_spool_every > 1 and num_servers == 1:
        raise ConfigError(
            f"--rollout-spool-every {wanted.rollout_spool_every} needs a second server: one alone that dies would find "
            "no weights to go on with; leave it out, or use more servers"
        )


def _check_devices(wanted: RolloutConfig, *, cuda: bool) -> None:
    """Raise ConfigError for what only servers on GPUs can do."""
    flags = {
        "--rollout-colocated": wanted.rollout_colocated,
        "--rollout-memory-fraction": wanted.rollout_memory_fraction is not None,
        "--rollout-sync ipc": wanted.rollout_sync == "ipc",
    }
    for flag, given in flags.items():
        if given and not cuda:
            raise ConfigError(f"{flag} needs CUDA, which this machine does not have; leave it out")
