"""Weights in this process's GPU memory, told to a server's workers as handles: nothing is copied on the way.

The other side is ``MultiprocessingSerializer`` of SGLang 0.5.23: an unpickler that takes listed names only, torch's own
``rebuild_cuda_tensor`` among them, in which it replaces the number of the device by its UUID. Each worker reads the
payload of its own rank. Torch counts who has opened a handle, so that one which two workers opened would be given up
too early: every worker of every server gets its own.

Never run on CUDA: the form is held to SGLang's own code, the memory is not.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from prism_megatron.rollout.weight_buckets import Piece, flat, metadata

_DEVICE = 6
"""Place of the device's number among the arguments of ``rebuild_cuda_tensor``."""

Reduced = tuple[Callable[..., Tensor], tuple[Any, ...]]


class Handles:
    """A piece in GPU memory. It must be kept until the servers have answered, which is when they have read it."""

    def __init__(self, piece: Piece) -> None:
        self._flat = on_device(piece)
        self._metadata = metadata(piece)

    def body(self, fields: Mapping[str, Any], *, num_workers: int) -> dict[str, Any]:
        """The request of one server with so many workers."""
        return {
            **fields,
            "load_format": "flattened_bucket",
            "serialized_named_tensors": [self._payload() for _ in range(num_workers)],
        }

    def _payload(self) -> str:
        frame = io.BytesIO()
        pickler = pickle.Pickler(frame)
        pickler.dispatch_table = {torch.Tensor: shared}
        pickler.dump({"metadata": self._metadata, "flattened_tensor": self._flat})
        return base64.b64encode(frame.getvalue()).decode()


def on_device(piece: Piece) -> Tensor:
    """All bytes of a piece in this process's GPU memory, written when this returns; ``[bytes]``."""
    torch.cuda.ipc_collect()  # what servers have let go of since the last piece
    there = flat(piece).cuda()
    torch.cuda.current_stream().synchronize()
    return there


def shared(tensor: Tensor) -> Reduced:
    """How a worker finds the tensor: torch's way, with the UUID of its device, which has another number there."""
    rebuild, arguments = reductions.reduce_tensor(tensor)
    uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
    return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
