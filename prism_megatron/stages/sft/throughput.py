"""How fast steps are, on devices whose peak is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from prism_megatron.config.architecture.model import FreezeGroup
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.observability.model_flops import Arithmetic, Work, peak_of, work_of
from prism_megatron.parallel.collectives import sum_numbers
from prism_megatron.stages.sft.demonstrations import Row


@dataclass(frozen=True)
class Throughput:
    """What turns a step's rows and seconds into tokens and FLOPs a second."""

    arithmetic: Arithmetic
    merge: int
    freeze: tuple[FreezeGroup, ...]
    peak_tflops: float
    """of one device, in the format that is trained in"""

    def row(self, rows: Sequence[Row], seconds: float, *, found: float, world: World) -> Figures:
        """Figures of a step that took so long, of all ranks together; ``rows`` are this data-parallel rank's.

        The features of a share ``found`` of all images were there already.
        """
        own = sum((self._work(row) for row in rows), Work())
        work = Work(**sum_numbers(asdict(own), device=world.device, group=world.groups.dp))
        flops = self.arithmetic.training_flops(work, freeze=self.freeze, from_disk=found)
        tflops = flops / seconds / world.world_size / 1e12
        return {
            "speed/tokens_per_second_per_gpu": work.tokens / seconds / world.world_size,
            "speed/model_tflops_per_gpu": tflops,
            "speed/mfu": tflops / self.peak_tflops,
        }

    def _work(self, row: Row) -> Work:
        works = (
            work_of(len(one.token_ids), int(sum(mask)), [image.grid_thw for image in one.images], merge=self.merge)
            for one, mask in row.demonstrations
        )
        return sum(works, Work())


def peak_here(dtype: torch.dtype) -> float | None:
    """The peak of this rank's device in ``dtype``; None where there is none, or it is not known."""
    if dtype != torch.bfloat16 or not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name())
