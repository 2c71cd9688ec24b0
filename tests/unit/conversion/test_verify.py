"""A source must hold exactly the model's weights; complaints name the nearest neighbour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.ops import Replicated
from prism_megatron.conversion.verify import check_names
from prism_megatron.errors import ConversionError

MAPPINGS = [
    WeightMapping(("embed.weight",), "e", Replicated(), optional_alias="head.weight", hf_shapes=((4, 2),)),
    WeightMapping(("layers.0.mlp.gate_proj.weight",), "g", Replicated(), hf_shapes=((3,),)),
    WeightMapping(("layers.1.extra",), "x", Replicated()),
]


class Source(TensorSource):
    def __init__(self, **changes: Tensor | None) -> None:
        tensors: dict[str, Tensor | None] = {
            "embed.weight": torch.ones(4, 2),
            "layers.0.mlp.gate_proj.weight": torch.ones(3),
            "layers.1.extra": torch.ones(9),
        }
        tensors.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}


def test_exact_sources_pass() -> None:
    check_names(MAPPINGS, Source())
    check_names(MAPPINGS, Source(head__weight=torch.ones(4, 2)))
    undefined = torch.full((4, 2), torch.nan)
    check_names(MAPPINGS, Source(embed__weight=undefined, head__weight=undefined.clone()))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            Source(layers__0__mlp__gate_proj__weight=None, layers__0__mlp__gate__weight=torch.ones(3)),
            r"missing, first 'layers.0.mlp.gate_proj.weight' \(nearest here: 'layers.0.mlp.gate.weight'\)",
        ),
        (Source(layers__2__extra=torch.ones(9)), r"not weights.*'layers.2.extra' \(nearest here: 'layers.1.extra'\)"),
        (Source(embed__weight=torch.ones(5, 2)), r"'embed.weight' has shape \(5, 2\).*makes it \(4, 2\)"),
        (Source(head__weight=torch.zeros(4, 2)), "tied"),
        (Source(embed__weight=torch.zeros(4, 2), head__weight=-torch.zeros(4, 2)), "tied"),
        (Source(head__weight=torch.ones(4, 2, dtype=torch.bfloat16)), "tied"),
    ],
)
def test_what_does_not_fit_is_named(source: Source, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        check_names(MAPPINGS, source)
