"""What a step does to a device's memory, and whether it waits for the device: seen from torch's dispatcher.

A ``Watch`` sees every operation of its thread, backward passes included, on fake tensors and on real ones alike. It
counts the storages that live, and refuses what would be wrong, or would make the host wait, on a GPU.
"""

from __future__ import annotations

import itertools
import linecache
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

WAITS = frozenset(
    {
        aten._local_scalar_dense.default,
        aten.nonzero.default,
        aten.masked_select.default,
        aten.repeat_interleave.Tensor,
        aten.equal.default,
        aten.bincount.default,
        aten._unique2.default,
    }
)
"""Operations whose result, or its size, the host needs before it goes on: .item(), .tolist(), bool() and float() are
the first of them."""
_COPIES = frozenset({aten._to_copy.default, aten.copy_.default})
_INDEXED = frozenset({aten.index.Tensor, aten.index_put.default, aten.index_put_.default})
_ONE: dict[bool, float | int] = {True: 1.0, False: 1}
"""What the host reads of a fake tensor between passes."""
_OURS = ("prism_megatron", "model_providers")


class DevicePassError(RuntimeError):
    """A step does what a GPU would not take, or would wait for; the message names the line."""


class MixedDevicesError(DevicePassError):
    """Tensors of the host and of the device meet in one operation."""


class HostWaitError(DevicePassError):
    """The host waits for the device inside a pass over micro-batches."""


class Watch(TorchDispatchMode):
    """Counts bytes of the storages on ``device_type`` that live, and refuses waiting while a pass runs (``passing``).

    Example: ``with Watch("lazy") as watch: ...; watch.held, watch.peak_since()``.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's modes carry no types
        self.device_type = device_type
        self.held = 0
        """bytes of all storages that live"""
        self.operations = 0
        self._peak = 0
        self._sizes: dict[int, int] = {}
        self._numbers = itertools.count()
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._passing = False

    @contextmanager
    def passing(self) -> Iterator[None]:
        """While micro-batches run forward and backward: nothing may wait for the device."""
        before, self._passing = self._passing, True
        try:
            yield
        finally:
            self._passing = before

    @property
    def is_passing(self) -> bool:
        return self._passing

    def begin_peak(self) -> int:
        """Forget the peak so far; bytes that are held now."""
        self.recount()
        self._peak = self.held
        return self.held

    def peak(self) -> int:
        """Most bytes that were held at a time since ``begin_peak``."""
        return self._peak

    def recount(self) -> None:
        """Take the sizes of storages anew: those that were resized in place, as by an offload, tell nobody."""
        for storage, number in list(self._known.items()):
            self._sizes[number] = storage.nbytes()
        self.held = sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the operation, run it, count what it made."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _device(args[0])
        self.operations += 1
        self._check(func, args, kwargs, _tensors((*args, *kwargs.values())))
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _ONE[args[0].dtype.is_floating_point]
        result = func(*args, **kwargs)
        for made in _tensors((result,)):
            self.count(made)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        if _device(tensor).type != self.device_type:
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        number = next(self._numbers)
        self._known[storage] = number
        self._sizes[number] = storage.nbytes()
        self.held += self._sizes[number]
        self._peak = max(self._peak, self.held)
        weakref.finalize(storage, self._forget, number)

    def _forget(self, number: int) -> None:
        self.held -= self._sizes.pop(number)

    def _check(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        if func in _COPIES:
            self._check_copy(func, args, kwargs)
            return
        kinds = {_device(tensor).type for tensor in given if tensor.dim()}
        if len(kinds) > 1:
            raise MixedDevicesError(
                f"{func} is given tensors of {' and '.join(sorted(kinds))}: {_shapes(given)}; bring all of them to the "
                f"device {_where()}"
            )
        if not self._passing or self.device_type not in {_device(tensor).type for tensor in given}:
            return
        by_mask = func in _INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask and func is not aten.index.Tensor and args[2].numel() == 1:
            return  # torch fills by the mask
        if func in WAITS or by_mask:
            raise HostWaitError(
                f"{func}{' by a mask' if by_mask else ''} makes the host wait for the device {_where()}"
            )

    def _check_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """A copy to the host waits, and so does one from the host that is not asked to run by itself."""
        if not self._passing:
            return
        if func is aten.copy_.default:
            target, source = _device(args[0]).type, args[1]
            alone = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False))
        else:
            source = args[0]
            target = torch.device(kwargs.get("device") or _device(source)).type
            alone = bool(kwargs.get("non_blocking", False))
        kinds = {target, _device(source).type}
        if len(kinds) == 1 or self.device_type not in kinds or (alone and target == self.device_type):
            return
        raise HostWaitError(
            f"a copy of {tuple(source.shape)} from {_device(source).type} to {target} makes the host wait for the "
            f"device {_where()}"
        )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among an operation's arguments or results, which may stand in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _device(tensor: Tensor) -> torch.device:
    """Of a fake without asking the dispatcher."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(f"{_device(tensor).type} {tuple(tensor.shape)}" for tensor in tensors)


def _where() -> str:
    """The innermost line of ours that is running, or else of whoever called torch."""
    frame = sys._getframe(1)
    first = None
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in _OURS and not name.startswith("prism_megatron.engine.dry"):
            first = frame
            break
        frame = frame.f_back  # type: ignore[assignment]
    if first is None:
        return "(in a backward pass)"
    path, line = first.f_code.co_filename, first.f_lineno
    return f"at {path}:{line}: {linecache.getline(path, line).strip()}"
