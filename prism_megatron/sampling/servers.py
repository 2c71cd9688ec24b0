"""SGLang servers for a whole world of ranks: they are started, or given by URL."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
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
from prism_megatron.parallel.collectives import all_gather_objects, barrier, broadcast_object
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.weight_spool import remove_leftovers
from prism_megatron.sampling.replicas import end_token_ids
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.sampling.started_servers import Started, start_servers
from prism_megatron.training.roles import weights_in_layout

API_KEY = "PRISM_ROLLOUT_API_KEY"
"""Variable with the key of servers given by URL."""

_FOLDER, _MODEL = "rollout", "model"


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
    """Servers of the policy, started by the first rank of each host or given by URL, and a client on every rank.

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
        barrier()
    folder = exported or source
    started: Started | None = None
    if wanted.rollout_urls:
        urls: Sequence[str] = wanted.rollout_urls
        api_key: str | None = broadcast_object(os.environ.get(API_KEY), source=0)
    else:
        started = start_servers(wanted, data, folder, world=world, dtype=dtype, logs=output / _FOLDER)
        urls, api_key = started.urls, started.api_key
    first = world.rank % len(urls)  # ranks with one request each should not all ask the same server
    options = SGLangOptions(
        transport=wanted.rollout_sync,
        bucket_bytes=wanted.rollout_bucket_mib * 2**20,
        master_address=wanted.rollout_master_address,
        spool_every=wanted.rollout_spool_every,
        return_seconds=60.0 * wanted.rollout_return_minutes,
        seconds=60.0 * wanted.rollout_timeout_minutes,
        router=wanted.rollout_router,
        colocated=wanted.rollout_colocated,
    )
    connect = partial(
        SGLangRollout,
        folder,
        renderer.segment_finder,
        urls=(*urls[first:], *urls[:first]),
        api_key=api_key,
        end_token_ids=end_token_ids(folder, renderer),
        spool=output / _FOLDER,
        servers=None if started is None else started.servers,
        board=None if started is None else started.board,
        near=() if started is None else started.near,
        options=options,
    )
    engine = _connected(connect, started)
    shared = SharedRollout(engine, world, exported=exported, let_go=give_back if wanted.rollout_colocated else None)
    shared.sleep()  # colocated servers make room for the players until the first weights
    return shared


def _connected(connect: Callable[[], SGLangRollout], started: Started | None) -> SGLangRollout:
    """This rank's client. Raises RolloutError on every rank where one is cut off from servers that others reach."""
    engine: SGLangRollout | None = None
    problem: str | None = None
    try:
        engine = connect()
    except PrismError as error:
        problem = str(error)
    problem = next((one for one in all_gather_objects(problem) if one is not None), None)
    if engine is None or problem is not None:
        if engine is not None:
            engine.close()
        elif started is not None and started.servers is not None:
            started.servers.stop()
        raise RolloutError(problem)
    return engine


def _is_served_as_it_is(folder: Path, shape: Qwen3VLShape) -> bool:
    """Servers would keep quantised weights quantised, and take fused experts for those of the published order."""
    is_quantised = CONFIG_KEY in read_object(member(folder, "config.json"))
    return not is_quantised and detect_expert_layout(HFFolder(folder), shape) != "transformers"


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
