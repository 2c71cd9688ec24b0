"""Values of the host on a device: the same values, and on the CPU the same memory."""

from __future__ import annotations

import numpy as np
import torch

from prism_megatron.parallel.host_to_device import on_device

CPU = torch.device("cpu")


def test_values_arrive_as_they_are() -> None:
    """Claim: arrays in any order of memory and tensors keep shape, dtype and values."""
    table = np.arange(6, dtype=np.int64).reshape(2, 3)
    for given in (table, table.T, table[:, ::2], torch.from_numpy(table)):
        found = on_device(given, CPU)
        assert found.dtype == torch.int64
        assert found.tolist() == given.tolist()


def test_the_cpu_copies_nothing() -> None:
    """Claim: a contiguous array and a tensor are on the CPU already."""
    array, tensor = np.zeros(3), torch.zeros(3)
    assert on_device(array, CPU).data_ptr() == array.ctypes.data
    assert on_device(tensor, CPU) is tensor
