"""What an engine is made of: a rank's pipeline chunks, in Megatron's data parallelism."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from prism_megatron.engine.host.compat import buffer_layout_arguments
from prism_megatron.engine.host.fast_paths import FastPaths
from prism_megatron.engine.provider import ModelProvider
from prism_megatron.engine.runtime import World


def sum_gradients(
    chunks: list[DistributedDataParallel],
    _num_tokens: Tensor | None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Megatron's ``finalize_model_grads`` without its division: losses come divided by their global counts."""
    finalize_model_grads(chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)


def build_chunks(
    provider: ModelProvider, config: TransformerConfig, world: World, dtype: torch.dtype
) -> list[MegatronModule]:
    """This rank's pipeline chunks (one per virtual stage), parameters in ``dtype``.

    Only parameters are cast: buffers such as rotary frequencies stay in fp32, which Megatron's Float16Module would
    round, and its output is not blown up to fp32 either.
    """
    num_chunks = world.parallel.vpp
    modules = []
    for index in range(num_chunks):
        module = provider.build_chunk(
            config,
            world.groups,
            pre_process=world.is_first_stage and index == 0,
            post_process=world.is_last_stage and index == num_chunks - 1,
            vp_stage=index if num_chunks > 1 else None,
        )
        module.to(world.device)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        modules.append(module)
    return modules


def data_parallel(
    module: MegatronModule, config: TransformerConfig, world: World, distributed: bool, fast: FastPaths
) -> DistributedDataParallel:
    """Megatron's DDP: gradients accumulate in fp32 and are *summed* over data-parallel ranks, never averaged."""
    assert config.calculate_per_token_loss, "providers set calculate_per_token_loss, or DDP would average gradients"
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=fast.overlap_grad_reduce,
        overlap_param_gather=fast.overlap_param_gather,
        bucket_size=fast.bucket_parameters,
    )
    return DistributedDataParallel(
        config=config,
        ddp_config=ddp_config,
        module=module,
        pg_collection=world.groups,
        **buffer_layout_arguments(list(module.parameters()), ddp_config, world.groups),
    )
