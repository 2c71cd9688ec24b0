"""Megatron-Core, imported for processes in which nothing is compiled: those without a GPU.

Megatron's ``jit_fuser`` is ``torch.compile``, which loads torch's compiler once it is given a function: 540 modules.
Without a GPU all of them run as they are written (``engine/host/cpu.py``), so here they are left so. Afterwards
``torch.compile`` is torch's again.
"""

from __future__ import annotations

from typing import Any

import torch


def _as_it_is(model: Any = None, **_options: Any) -> Any:
    return _as_it_is if model is None else model


_compile = torch.compile
torch.compile = _as_it_is
try:
    import megatron.core  # noqa: F401
finally:
    torch.compile = _compile
