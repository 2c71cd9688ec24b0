"""Builds the roles that a stage trains and the form of their batches, from folders; writes them as folders again."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model_providers.qwen3_vl.mapping import LM_HEAD, weight_mappings
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.model import FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import NO_ROUTER_LOSSES, RouterLosses
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.conversion.checkpoints.folder import ModelFiles, files_folder, is_checkpoint, read_state
from prism_megatron.conversion.checkpoints.source import CheckpointSource
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.expert_layout import ExpertLayout, detect_expert_layout
from prism_megatron.conversion.expert_relayout import relaid
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.conversion.hf.writer import CONFIG, read_companions, stating, write_hf_folder
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine import checkpoint
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import PLAIN, Execution
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError
from prism_megatron.parallel.collectives import barrier
from prism_megatron.training.batches import BatchFormat

DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def resolve_dtype(requested: str, shape: Qwen3VLShape) -> torch.dtype:
    """``auto`` takes the dtype that the model folder states. Raises ConfigError for fp16 and others."""
    name = shape.dtype if requested == "auto" else requested
    if name not in DTYPES:
        raise ConfigError(f"--dtype {requested}: the model folder states {name!r}; use --dtype bf16 or --dtype fp32")
    return DTYPES[name]


def batch_format(
    renderer: Renderer,
    world: World,
    execution: Execution = PLAIN,
    *,
    unseen: frozenset[int] = frozenset(),
    share_prompts: bool = False,
) -> BatchFormat:
    """Sequences are padded to what sequence and context parallelism divide, and FP8 multiplies.

    ``unseen`` and ``share_prompts`` are those of ``BatchFormat``.
    """
    return BatchFormat(
        pad_token_id=renderer.pad_token_id,
        end_token_id=renderer.end_token_id,
        length_multiple=execution.precision.length_multiple(world.parallel),
        device=world.device,
        unseen_token_ids=unseen,
        share_prompts=share_prompts,
    )


def build_policy(
    folder: Path,
    shape: Qwen3VLShape,
    *,
    world: World,
    dtype: torch.dtype,
    optimizer: OptimizerConfig | None,
    total_steps: int,
    freeze: Collection[FreezeGroup] = (),
    router_losses: RouterLosses = NO_ROUTER_LOSSES,
    execution: Execution = PLAIN,
) -> MegatronEngine:
    """The policy with the weights of ``folder`` (see ``load_weights``); without ``optimizer`` it stays as it is."""
    engine = MegatronEngine(
        name="policy",
        provider=Qwen3VLProvider(shape, freeze=freeze, router_losses=router_losses, execution=execution),
        world=world,
        dtype=dtype,
        optimizer=optimizer,
        total_steps=total_steps,
        fast=execution.fast,
    )
    load_weights(engine, folder)
    return engine


def load_weights(engine: MegatronEngine, folder: Path) -> None:
    """Take the weights of a Hugging Face folder, or those that a checkpoint, converted or of training, has of the role.

    On all ranks together. Raises ConversionError or CheckpointError where they do not fit.
    """
    if is_checkpoint(folder):
        checkpoint.load_weights(folder, engine, engine.name)
    else:
        engine.load_hf(open_weights(folder))


def hf_tensors(folder: Path, shape: Qwen3VLShape) -> TensorSource:
    """A policy's tensors under their Hugging Face names, of a model folder or of a checkpoint."""
    if not is_checkpoint(folder):
        return open_weights(folder)
    return CheckpointSource(TorchDistFolder(folder), "policy", weight_mappings(shape))


def weights_in_layout(folder: Path, shape: Qwen3VLShape, layout: ExpertLayout) -> Iterator[tuple[str, Tensor]]:
    """A policy's weights, of a model folder or of a checkpoint, with experts stored as ``layout``."""
    if is_checkpoint(folder):
        source: TensorSource = CheckpointSource(TorchDistFolder(folder), "policy", weight_mappings(shape, layout))
        held = None
    else:
        source = open_weights(folder)
        held = detect_expert_layout(source, shape)
    if held in (None, layout):
        return ((name, source.get(name)) for name in source.names())
    return relaid(source, weight_mappings(shape, held), weight_mappings(shape, layout))


def model_files(folder: Path, role: str, *, dtype: torch.dtype) -> ModelFiles:
    """What checkpoints keep of a role that starts from ``folder``, whose own account counts if it is a checkpoint.

    The config says ``dtype``, the engine's, which is that of the weights in the checkpoint.
    """
    files = read_companions(files_folder(folder, role))
    files[CONFIG] = stating(files[CONFIG], dtype)
    if is_checkpoint(folder):
        return ModelFiles(files, tuple(read_state(folder)["models"][role]["aliases"]))
    tied = Qwen3VLShape.from_folder(folder).text.tied
    repeats_embedding = tied and LM_HEAD in open_weights(folder).names()
    return ModelFiles(files, (LM_HEAD,) if repeats_embedding else ())


def export_folder(
    engine: MegatronEngine, target: Path, *, like: Path, world: World, dtype: torch.dtype | None = None
) -> None:
    """Write an engine's weights as a Hugging Face folder beside the files of ``like``; all ranks take part.

    ``dtype`` is what is stored, while the config says what to compute in; by default both are the engine's own.
    """
    tensors = ((name, tensor.to(dtype or engine.dtype)) for name, tensor in engine.export_hf())
    if world.is_main:
        write_hf_folder(target, tensors, like=like, dtype=engine.dtype if dtype is None else None)
    else:
        deque(tensors, maxlen=0)
    barrier()
