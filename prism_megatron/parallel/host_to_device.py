"""From host memory to the device without waiting for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def on_device(values: Tensor | npt.NDArray[Any], device: torch.device) -> Tensor:
    """Values of the host as a tensor on ``device``, in the order of its work.

    ``tensor.to(cuda)`` makes the host wait until all that the GPU has been given before is done: a few of those in
    every forward pass, and the GPU idles while the host prepares the next kernels. A copy from pinned memory does not.
    On the CPU a contiguous array is not copied.
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
