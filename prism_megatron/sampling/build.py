"""Who samples for a run: replicas in its own processes, or servers; and who asks held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.exam import ExamConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.rollout.weight_buckets import GATHERED_SHARE
from prism_megatron.sampling.exam import Exam, ExamTimes
from prism_megatron.sampling.handover import Handover, SharedHandover
from prism_megatron.sampling.probe import ServingProbe
from prism_megatron.sampling.replicas import build_replicas
from prism_megatron.sampling.servers import build_served_rollout
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.sampling.shares import RewardGroup
from prism_megatron.training.batches import BatchFormat


def build_rollout(
    rollout: RolloutConfig,
    data: DataConfig,
    source: Path,
    shape: Qwen3VLShape,
    renderer: Renderer,
    *,
    output: Path,
    world: World,
    dtype: torch.dtype,
) -> RolloutEngine:
    """The engine that ``--rollout`` names, for the policy of ``source``; it has no weights before a first hand-over.

    ``output`` is the run's folder, where servers keep logs and weights. All ranks call it together. Raises ConfigError
    or RolloutError, on every rank, where it does not fit or cannot be started.
    """
    if rollout.rollout == "sglang":
        return build_served_rollout(rollout, data, source, shape, renderer, output=output, world=world, dtype=dtype)
    return build_replicas(rollout, data, files_folder(source, "policy"), shape, renderer, world=world, dtype=dtype)


def sampling_of(rollout: RolloutConfig, data: DataConfig) -> Sampling:
    """How tokens are drawn."""
    return Sampling(temperature=rollout.temperature, top_p=rollout.top_p, max_new_tokens=data.max_response_tokens)


def build_exam(
    config: ExamConfig,
    examples: Sequence[Example],
    rollout: RolloutEngine,
    sampling: Sampling,
    reward: RewardGroup,
    *,
    seed: int,
    steps: int,
    save_every: int,
    world: World,
) -> Exam | None:
    """Who asks held-out ``examples`` in a run of so many ``steps`` with this ``seed``; None where there are none."""
    if not examples:
        return None
    times = ExamTimes(steps, config.eval_every, save_every)
    # Draws of the steps have the seed itself.
    return Exam(
        examples, rollout, sampling, reward, num_samples=config.eval_rollouts, seed=seed + 1, times=times, world=world
    )


def build_handover(
    config: RolloutConfig,
    policy: MegatronEngine,
    rollout: RolloutEngine,
    *,
    examples: Sequence[Example],
    form: BatchFormat,
) -> Handover:
    """From ``policy`` to ``rollout``; where it is asked for, servers are probed with one of the ``examples``."""
    gather_bytes = config.rollout_bucket_mib * 2**20 // GATHERED_SHARE
    if not isinstance(rollout, SharedRollout):
        return Handover(policy, rollout, gather_bytes)
    if not config.rollout_probe_every:
        return SharedHandover(policy, rollout, gather_bytes)
    probe = ServingProbe(
        examples,
        every=config.rollout_probe_every,
        bound=config.rollout_probe_bound,
        form=form,
        world=policy.world,
    )
    return SharedHandover(policy, rollout, gather_bytes, partial(probe.check, rollout, policy))
