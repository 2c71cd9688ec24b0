"""Are these exactly the rollout model's weights? Asked before anything is sent: a server takes an unknown name without
a word and dies of a wrong shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import Tensor

from prism_megatron.errors import WeightSyncError

TIED_NAME = "lm_head.weight"
_NUM_NAMES_SHOWN = 4


@dataclass(frozen=True)
class WeightCheck:
    """What the rollout model holds. A ``tied`` model's ``lm_head.weight`` may come or not."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: bool

    def check_names(self, announced: Mapping[str, tuple[int, ...]], *, left_out: AbstractSet[str]) -> None:
        """Raise WeightSyncError unless ``announced`` and ``left_out`` together are exactly the model's weights."""
        for name, shape in announced.items():
            self._check(name, shape)
        self._check_complete(announced.keys() | left_out)

    def passed(
        self, tensors: Iterable[tuple[str, Tensor]], *, left_out: AbstractSet[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """The same tensors. Raises WeightSyncError at an unknown, repeated or misshapen one, or at the end."""
        seen: set[str] = set()
        for name, tensor in tensors:
            self._check(name, tuple(tensor.shape))
            if name in seen:
                raise WeightSyncError(f"weight {name!r} was sent twice; each name may come once per update")
            seen.add(name)
            yield name, tensor
        self._check_complete(seen | left_out)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.shapes and not (self.tied and name == TIED_NAME):
            raise WeightSyncError(f"rollout model has no weight {name!r}; export the policy under Hugging Face names")
        if name in self.shapes and shape != self.shapes[name]:
            raise WeightSyncError(
                f"weight {name!r} has shape {shape}, the rollout model's is {self.shapes[name]}; "
                "was a shard sent without being gathered?"
            )

    def _check_complete(self, names: AbstractSet[str]) -> None:
        missing = [name for name in self.shapes if name not in names and not (self.tied and name == TIED_NAME)]
        if missing:
            shown = ", ".join(missing[:_NUM_NAMES_SHOWN]) + (", …" if len(missing) > _NUM_NAMES_SHOWN else "")
            raise WeightSyncError(
                f"{len(missing)} of {len(self.shapes)} weights of the rollout model were not sent: {shown}"
            )
