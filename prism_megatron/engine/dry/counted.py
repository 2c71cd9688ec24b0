"""An engine that counts what it holds, on fake tensors or on real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.engine.batch import Batch
from prism_megatron.engine.dry.watch import Watch
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.provider import LossFn, LossOutput, StepResult


@dataclass
class Counted:
    """Bytes on the device, of one role on one rank."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    """masters and moments, with what else stands beside the model between steps"""
    pass_peak: int = 0
    """most that a pass over the micro-batches holds beside these"""
    step_peak: int = 0
    """the same of the optimizer's step"""


class CountedEngine(MegatronEngine):
    """The engine of a run, under a watch."""

    def __init__(self, watch: Watch, **settings: Any) -> None:
        """``settings`` are the engine's own; ``watch`` is entered already, and counts nothing else."""
        self._watch = watch
        super().__init__(**settings)
        parameters = {one.untyped_storage() for module in self.modules for one in module.parameters()}
        buffers = [buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        gradients = {buffer.grad_data.untyped_storage() for buffer in buffers}
        of_parameters, of_gradients = (sum(one.nbytes() for one in found) for found in (parameters, gradients))
        rest = watch.begin_peak() - of_parameters - of_gradients
        self.counted = Counted(of_parameters, of_gradients, rest)

    def step(self, *, update: bool = True) -> StepResult:
        """As the engine's, counted."""
        held = self._watch.begin_peak()
        result = super().step(update=update)
        self.counted.step_peak = max(self.counted.step_peak, self._watch.peak() - held)
        return result

    def _outputs(self, batches: Sequence[Batch], loss: LossFn, *, forward_only: bool) -> list[LossOutput]:
        held = self._watch.begin_peak()
        outputs = super()._outputs(batches, loss, forward_only=forward_only)
        self.counted.pass_peak = max(self.counted.pass_peak, self._watch.peak() - held)
        return outputs
