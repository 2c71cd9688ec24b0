"""SGLang servers for a whole world of ranks: the main rank starts them and hands weights over, all ranks sample."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.config.align import AlignConfig
from prism_megatron.conversion.checkpoint_folder import is_checkpoint
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError, PrismError, RolloutError, WeightSyncError
from prism_megatron.parallel.collectives import all_gather_objects, broadcast_object
from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.sglang import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang_server import ServerOptions, SGLangServers
from prism_megatron.types import Prompt, Rollout

API_KEY = "PRISM_ROLLOUT_API_KEY"
"""Variable with the key of servers given by URL."""

_FOLDER = "rollout"
_SPARE_TOKENS = 16  # SGLang keeps a few of a context to itself


class SharedRollout:
    """A RolloutEngine on every rank of a world, all on the same servers."""

    def __init__(self, engine: SGLangRollout, world: World) -> None:
        self._engine = engine
        self._world = world

    @property
    def policy_version(self) -> int | None:
        """As of ``SGLangRollout``; the same on every rank."""
        return self._engine.policy_version

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The main rank hands the weights over; the others take part in gathering them and wait.

        All ranks call it together. Raises WeightSyncError on every rank if the main rank could not.
        """
        self._engine.expect(version)
        all_gather_objects(None)  # a rank still unaware of the version would refuse answers that come with it
        remaining = iter(tensors)
        problem: str | None = None
        if self._world.is_main:
            try:
                self._engine.update_weights(remaining, version)
            except PrismError as error:
                problem = str(error)
        deque(remaining, maxlen=0)  # the other ranks would wait for ever in a gather that one left early
        problem, held = broadcast_object((problem, self._engine.policy_version), source=0)
        if not self._world.is_main:
            self._engine.follow(held)
        if problem is not None:
            raise WeightSyncError(problem)

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        prompt_offset: int = 0,
        samples: Sequence[range] | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """As of ``SGLangRollout``; every rank asks for its own samples."""
        return self._engine.generate(
            prompts, n, sampling, seed=seed, step=step, prompt_offset=prompt_offset, samples=samples
        )

    def close(self) -> None:
        """Close this rank's connections; the main rank also stops the servers that it started."""
        self._engine.close()


def build_served_rollout(
    config: AlignConfig, folder: Path, renderer: Renderer, *, world: World, dtype: torch.dtype
) -> SharedRollout:
    """Servers of the policy in ``folder``, started by the main rank or given by URL, and a client on every rank.

    Raises ConfigError or RolloutError on every rank if servers cannot be started or used.
    """
    if is_checkpoint(folder):
        raise ConfigError(
            f"--rollout sglang serves a Hugging Face folder, and --model {folder} is a checkpoint; make a folder of it "
            "with tools/convert.py to-hf, or use --rollout embedded"
        )
    wanted, output = config.rollout, config.checkpoint.output
    assert output is not None
    servers: SGLangServers | None = None
    problem: str | None = None
    if world.is_main and not wanted.rollout_urls:
        try:
            servers = _start(config, folder, world=world, dtype=dtype, logs=output / _FOLDER)
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
        end_token_ids=[renderer.end_token_id],
        spool=output / _FOLDER,
        servers=servers,
        supervised_elsewhere=not world.is_main and not wanted.rollout_urls,
        options=SGLangOptions(transport=wanted.rollout_sync, bucket_bytes=wanted.rollout_bucket_mib * 2**20),
    )
    return SharedRollout(engine, world)


def _start(config: AlignConfig, folder: Path, *, world: World, dtype: torch.dtype, logs: Path) -> SGLangServers:
    """Servers with room for the rollouts of all steps under way, shared evenly among them."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size)) != world.world_size:
        raise ConfigError(
            "--rollout sglang starts servers that only this host can reach, and the run spans several; start servers "
            "yourself and name them with --rollout-urls"
        )
    wanted, data = config.rollout, config.data
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions = int(model["text_config"]["max_position_embeddings"])
    context = min(positions, data.max_prompt_tokens + data.max_response_tokens + _SPARE_TOKENS)
    prompts = wanted.prompts_per_step * (1 + wanted.rollout_ahead)
    requests = -(-prompts // wanted.rollout_servers) * wanted.rollouts_per_prompt
    options = ServerOptions(
        model=folder,
        logs=logs,
        python=wanted.rollout_python,
        dtype=str(dtype).removeprefix("torch."),
        context_length=context,
        # With CUDA, SGLang fills what the memory holds; without, it would take most of the machine's.
        max_total_tokens=None if torch.cuda.is_available() else requests * context,
        max_running_requests=requests,
    )
    servers = SGLangServers(options, count=wanted.rollout_servers)
    servers.start()
    return servers
