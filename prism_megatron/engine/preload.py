"""Imported by the fork server before any rank exists; see ``launch.py``.

Importing torch, megatron-core and transformers takes seconds of CPU time; here they are imported once, and the ranks
forked from this process find them in place. Only imports: a thread pool or a generator started here would
be broken, or shared, in every rank. Where a GPU is present nothing is imported, because CUDA does not survive a fork.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path

from prism_megatron.engine.launch import LAUNCHER_PID, die_with_parent

MODULES = (
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.models.common.language_module.language_module",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen2.tokenization_qwen2",
    "safetensors.torch",
)
"""torch._dynamo is what the first optimizer step would import."""


def has_gpu() -> bool:
    """Whether the kernel shows an NVIDIA device; asking torch would initialise CUDA."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


if LAUNCHER_PID in os.environ:
    die_with_parent(int(os.environ[LAUNCHER_PID]))
    if not has_gpu():
        with warnings.catch_warnings():
            # megatron-core says in five places that without Transformer Engine and Apex it uses torch.
            warnings.filterwarnings(
                "ignore", message="Transformer Engine and Apex are not installed", category=UserWarning
            )
            for name in MODULES:
                importlib.import_module(name)
