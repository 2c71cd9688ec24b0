"""Memory that torch keeps for itself after tensors are gone."""

from __future__ import annotations

import gc

import torch


def give_back() -> None:
    """Give the device back what no tensor needs: torch's allocator keeps it, and no other process can have it.

    Tensors that only wait for the garbage collector count as needed, so it runs first. Nothing happens without CUDA.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.synchronize()  # a block that another stream still uses is kept
        torch.cuda.ipc_collect()  # and one that another process had opened
        torch.cuda.empty_cache()
