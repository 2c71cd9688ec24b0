"""One rank of a world that is not there, whose tensors are fakes of a device that stands for CUDA.

The device is torch's ``lazy``: unlike fake CUDA tensors, its fakes can be differentiated by a build of torch for CPUs,
and torch does not let them meet tensors of the host.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.dry.answers import ANSWERS
from prism_megatron.engine.dry.counted import CountedEngine
from prism_megatron.engine.dry.watch import Watch
from prism_megatron.engine.host.cpu import open_cpu_door, standing_for_cuda
from prism_megatron.engine.provider import LossFn, LossOutput, PassOutput
from prism_megatron.engine.runtime import World, divide, stop

STAND_IN = torch.device("lazy", 0)


@dataclass(frozen=True, eq=False)
class DryWorld:
    """A rank's place, and the watch over what its tensors do."""

    world: World
    watch: Watch


@functools.cache
def _fakes() -> FakeTensorMode:
    """Open the CPU door and apply ``ANSWERS``, once; the mode is one for all worlds, for Megatron keeps tensors."""
    open_cpu_door()
    for answer in ANSWERS:
        answer.apply()
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def dry_world(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[DryWorld]:
    """Be ``rank`` of ``world_size`` ranks: all tensors made inside are fakes, and are watched.

    Changes torch and Megatron for the rest of the process (``answers.ANSWERS``). Raises ConfigError as
    ``runtime.start``, and for virtual pipeline stages, whose order of payloads is not played.
    """
    mode = _fakes()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    world = divide(parallel, seed=0, device=STAND_IN, timeout=timedelta(minutes=1))
    try:
        with standing_for_cuda(STAND_IN), mode, Watch(STAND_IN.type) as watch:
            yield DryWorld(world, watch)
    finally:
        stop(world)


class DryEngine(CountedEngine):
    """The engine of a run, on fakes: it knows what the neighbouring stages would send, and tells when a pass runs."""

    def __init__(self, dry: DryWorld, **settings: Any) -> None:
        """``settings`` are the engine's own."""
        self._to_come: deque[Sequence[int]] = deque()
        self._rows: list[int] = []
        with STAND_IN:  # Megatron allocates on the default device where there is no CUDA
            super().__init__(dry.watch, world=dry.world, **settings)

    def _outputs(self, batches: Sequence[Batch], loss: LossFn, *, forward_only: bool) -> list[LossOutput]:
        self._rows = [len(batch.lengths) for batch in batches]
        if not self.world.is_first_stage:
            self._to_come = deque(self.modules[0].payload_shape(batch) for batch in batches)
        with self._watch.passing():
            return super()._outputs(batches, loss, forward_only=forward_only)

    def _schedule_arguments(self) -> dict[str, Any]:
        if self.world.parallel.pp == 1:
            return {}
        return {"p2p_communicator": _Neighbours(self.world.groups.pp, self.config, self._to_come)}

    def _share(self, outputs: Sequence[LossOutput], *, more: bool) -> PassOutput:
        if self.world.is_last_stage:
            return super()._share(outputs, more=more)
        self._measured()
        return PassOutput(_Told(), _Told(), [_Rows(count, self.world.device) for count in self._rows])


class _Neighbours(P2PCommunicator):
    """Knows the shapes that stages tell each other: of payloads from the batches, of gradients from what was sent."""

    def __init__(self, group: dist.ProcessGroup, config: Any, to_come: deque[Sequence[int]]) -> None:
        super().__init__(pp_group=group, config=config)
        self._to_come = to_come
        self._sent: deque[Sequence[int]] = deque()

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Sequence[int], Sequence[int]]:
        del tensor_send_prev
        if tensor_send_next is not None:
            self._sent.append(tuple(tensor_send_next.shape))
        nothing = (0, 0, 0)
        return (
            self._to_come.popleft() if recv_prev else nothing,
            self._sent.popleft() if recv_next else nothing,
        )


class _Told(dict[str, float]):
    """Figures that the last stage would tell: 1 of each name that is asked for."""

    def __missing__(self, _name: str) -> float:
        return 1.0


class _Rows(Mapping[str, torch.Tensor]):
    """What the last stage would tell of a micro-batch's sequences, by any name."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device

    def __getitem__(self, _name: str) -> torch.Tensor:
        return torch.zeros(self._count, device=self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
