"""Kernels that give the same bits every time, on request: what torch, cuBLAS, NCCL and Transformer Engine are told.

The values are those that Megatron's own ``--deterministic-mode`` demands: ``megatron/training/arguments.py`` of
megatron-core 0.16.1 asks for NCCL_ALGO, and its door to Transformer Engine refuses to run without the variable of that.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from prism_megatron.errors import ConfigError

_ALLOWED: dict[str, tuple[str, ...]] = {
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Values of each variable that leave nothing to chance; the first is set where there is none."""


def be_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have this process compute the same every time; call it before CUDA, NCCL or a layer is first used.

    Raises ConfigError for a variable that is set to something else than this allows.
    """
    for name, values in _ALLOWED.items():
        given = environment.setdefault(name, values[0])
        if given not in values:
            raise ConfigError(
                f"--deterministic needs {name} to be {' or '.join(values)}, and it is {given}; set it so, or unset it"
            )
    torch.use_deterministic_algorithms(True)
