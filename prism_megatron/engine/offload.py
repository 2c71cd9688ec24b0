"""Where a role's gradient buffers and optimizer state are while another role, or the rollouts, need the memory.

Tensors keep their identity: their storage is emptied and filled again, so that Megatron's views and the optimizer's
references stay as they are. On CUDA the copies run on a stream of their own, from and to pinned memory (not run in CI).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from prism_megatron.engine.optimizer import inner_optimizers


class Offload:
    """Releases gradient buffers, whose contents are dropped, and optimizer state, which waits in host memory."""

    def __init__(self, chunks: Sequence[Any], optimizer: ChainedOptimizer) -> None:
        """``chunks`` are wrapped in Megatron's DDP, which can release its buffers by itself."""
        self._chunks = chunks
        self._optimizer = optimizer
        self._released = False
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._hosts: dict[int, Tensor] = {}
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def release(self) -> None:
        """Empty the storage of gradients and of optimizer state. Nothing may read either before ``restore``."""
        if self._released:
            return
        for chunk in self._chunks:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for tensor in own_state(self._chunks, self._optimizer):
                host = torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)
                self._waiting.append((tensor, host.copy_(tensor, non_blocking=True)))
                self._hosts[_storage(tensor)] = host
                if self._stream is not None:
                    tensor.record_stream(self._stream)
                tensor.untyped_storage().resize_(0)
        self._released = True

    def where(self, tensor: Tensor) -> Tensor:
        """Where the numbers of ``tensor`` are: itself, or the host's copy while it is released.

        A checkpoint is read from there and loaded into there, so that nothing comes back to the device for it.
        """
        return self._hosts.get(_storage(tensor), tensor)

    def restore(self) -> None:
        """Fill optimizer state again and give gradients zeroed buffers; the copies may still be under way."""
        if not self._released:
            return
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=False)
        for tensor, _ in self._waiting:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for tensor, host in self._waiting:
                tensor.copy_(host, non_blocking=True)
                if self._stream is not None:
                    tensor.record_stream(self._stream)
        self._hosts.clear()
        self._released = False

    def wait(self) -> None:
        """Let the current stream and the host wait for what is copied; after ``restore``, give up the host's copies."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._stream.synchronize()  # the host's memory may be given away, or read, only now
        if not self._released:
            self._waiting.clear()


def own_state(chunks: Sequence[Any], optimizer: ChainedOptimizer) -> Iterator[Tensor]:
    """Moments, and master weights where they are not the model's own parameters; each storage once."""
    seen = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    for inner in inner_optimizers(optimizer):
        masters = [parameter for group in inner.param_groups for parameter in group["params"]]
        for tensor in (*masters, *(value for state in inner.state.values() for value in state.values())):
            if not isinstance(tensor, Tensor) or tensor.numel() < 2:  # counts of steps
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes() == tensor.numel() * tensor.element_size():
                seen.add(storage.data_ptr())
                yield tensor.detach()


def _storage(tensor: Tensor) -> int:
    """What tells storages apart, empty ones too."""
    return int(tensor.untyped_storage()._cdata)
