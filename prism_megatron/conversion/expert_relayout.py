"""A model's tensors in another layout of its experts, one parameter at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor

from prism_megatron.conversion.mapping import TensorSource, WeightMapping


class FusedExperts:
    """Puts tensors together from the slices of a layer's experts, which come one by one."""

    def __init__(self, mappings: Sequence[WeightMapping]) -> None:
        self._num_slices = Counter(name for m in mappings if m.expert is not None for name in m.hf_names)
        self._open: dict[str, Tensor] = {}
        self._added: Counter[str] = Counter()

    def add(self, mapping: WeightMapping, slices: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Keep one expert's slices; yields the tensors that they complete."""
        assert mapping.expert is not None
        for name, part in zip(mapping.hf_names, slices, strict=True):
            count = self._num_slices[name]
            self._open.setdefault(name, part.new_empty((count, *part.shape)))[mapping.expert] = part
            self._added[name] += 1
            if self._added[name] == count:
                yield name, self._open.pop(name)


def relaid(
    source: TensorSource, held: Sequence[WeightMapping], wanted: Sequence[WeightMapping]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``source``, whose mappings are ``held``, under the names of ``wanted``, each once.

    Both lists name the same parameters. Fused experts are read slice by slice; what is fused is put together whole.
    """
    target_of = {mapping.parameter: mapping for mapping in wanted}
    fused = FusedExperts(wanted)
    for mapping in held:
        target = target_of[mapping.parameter]
        tensors = target.op.merge(mapping.op.split(mapping.read(source), 1))
        if target.expert is None:
            yield from zip(target.hf_names, tensors, strict=True)
        else:
            yield from fused.add(target, tensors)
