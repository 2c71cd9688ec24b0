"""A policy whose vision tower is frozen takes the features of images from disk, where they are there."""

from __future__ import annotations

import hashlib

from model_providers.qwen3_vl.provider import Qwen3VLProvider, part_of
from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.engine.vision_cache import VisionCacheConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.vision.cache import VisionCache
from prism_megatron.engine.vision.feature_files import FeatureFiles
from prism_megatron.parallel.collectives import on_main


def use_vision_cache(policy: MegatronEngine, config: VisionCacheConfig) -> None:
    """Have ``policy`` keep the features of images as ``config`` says. All ranks together, once its weights are final.

    Raises DiskError for a folder that cannot be written to.
    """
    if config.cache_vision is None:
        policy.vision_cache = None
        return
    folder, max_bytes, world = config.cache_vision, int(config.cache_vision_gb * 1e9), policy.world
    on_main(lambda: FeatureFiles(folder, max_bytes=max_bytes) and None)
    policy.vision_cache = VisionCache(
        FeatureFiles(folder, max_bytes=max_bytes, writers=world.dp_size),
        tower=tower_identity(policy),
        group=world.groups.tp_cp,
        writes=world.tp_rank == 0 and world.cp_rank == 0,
    )


def tower_identity(policy: MegatronEngine) -> str:
    """Hash of the vision tower and the projector: weights, what of their shape weights do not show, number format."""
    assert isinstance(policy.provider, Qwen3VLProvider), "a policy is a Qwen3-VL"
    weights = policy.weights_digest(lambda name: part_of(name) in ALL_VISION)
    return hashlib.sha256(f"{weights} {policy.provider.shape.vision} {policy.dtype}".encode()).hexdigest()
