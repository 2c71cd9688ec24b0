"""Computing a part of the forward pass again in the backward pass, instead of keeping its intermediates.

Megatron's own ``tensor_parallel.checkpoint`` sees only the tensors that stand directly among a function's arguments
and results: what is inside a list loses its gradient, silently, and so does a part whose inputs need none (a vision
tower that reads pixels). torch's non-reentrant checkpoint follows the graph itself and has neither gap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[..., Any], *arguments: Any, fp8: bool = False) -> Any:
    """``function(*arguments)``, recomputed when it is differentiated.

    Nothing random may happen inside: the state of the generators is not restored. All ranks of a group recompute
    together, in the order of the backward pass, so collectives inside still meet. With ``fp8`` Transformer Engine's
    own checkpoint is used: torch's would recompute outside the FP8 context, and delayed scaling would count the same
    values twice.
    """
    if not fp8:
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    from transformer_engine.pytorch import checkpoint as te_checkpoint

    return te_checkpoint(function, *arguments, use_reentrant=False)
