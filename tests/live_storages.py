"""Counts bytes of tensors that come into being, by following their storages through torch's dispatcher."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Bytes beyond those that are there when it is made; ``peak`` is the most there ever were.

    A storage that was empty and is filled, as offload does it, counts as well. Enter it on each thread that is to be
    watched: a mode is a thread's own. Blind spots: memory that is not a tensor's, and what one operation takes and
    gives up within itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._lock = threading.RLock()
        self._held = {storage._cdata: storage for storage in _storages()}
        self._empty = [storage for storage in self._held.values() if storage.nbytes() == 0]
        self._new: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        """Bytes more than at the start."""
        return sum(storage.nbytes() for storage in self._empty) + sum(self._new.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        with self._lock:
            for tensor in tree_leaves(found):
                if isinstance(tensor, Tensor):
                    self._see(tensor.untyped_storage())
            self.peak = max(self.peak, self.now)
        return found

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._held and key not in self._new:
            weakref.finalize(storage, self._new.pop, key, None)
            self._new[key] = storage.nbytes()


def _storages() -> Iterator[torch.UntypedStorage]:
    for found in gc.get_objects():
        if isinstance(found, Tensor) and found.layout == torch.strided:
            yield found.untyped_storage()
