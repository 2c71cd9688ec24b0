"""The three ways in which folders store the experts of a layer, and how to tell which one a folder has.

``transformers``  fused, as transformers 5 keeps them: ``experts.gate_up_proj`` ``[experts, 2 · width, hidden]`` and
                  ``experts.down_proj`` ``[experts, hidden, width]``.
``hub``           fused under the same names, both transposed: as transformers 4 kept them, and as they are published.
                  Of the fused layouts it is the one that SGLang reads (0.5.23, ``models/qwen3_vl_moe.py``).
``per_expert``    ``experts.{e}.{gate,up,down}_proj.weight``, as quantised folders and our discriminators have them.

Each is a variant of the mapping list (``weight_mappings(shape, layout)``); nothing else knows of layouts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import ExpertSizes
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.errors import ConversionError

ExpertLayout = Literal["transformers", "hub", "per_expert"]

_FUSED = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_SINGLE = re.compile(r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight$")


def detect_expert_layout(source: TensorSource, shape: Qwen3VLShape) -> ExpertLayout | None:
    """The layout of a source's experts, from names and shapes; None for a dense model.

    None too where no tensor has the name and shape of any layout, which is left to ``verify.check_names``. A tensor
    whose shape is the same in both fused layouts (``hidden`` equal to its other side) tells nothing; the others decide.
    Raises ConversionError for a mixture of layouts, and where no tensor can tell.
    """
    if shape.text.experts is None:
        return None
    told: dict[ExpertLayout, str] = {}
    untold: list[str] = []
    shapes = source.shapes()
    for name in sorted(shapes):
        possible = _layouts_of(name, shapes[name], shape.text.hidden, shape.text.experts)
        if len(possible) == 1:
            told.setdefault(possible[0], name)
        elif possible:
            untold.append(name)
    if len(told) > 1:
        (one, first), (other, second) = list(told.items())[:2]
        raise ConversionError(
            f"experts are stored in two layouts: {first!r} {shapes[first]} is in the order of {one!r}, {second!r} "
            f"{shapes[second]} in that of {other!r}; save the model again with one version of transformers"
        )
    if untold and not told:
        raise ConversionError(
            f"{untold[0]!r} is {shapes[untold[0]]} in both known layouts of fused experts (its input is as wide as its "
            "output) and no other tensor tells which one the folder has; save the model with one tensor per expert"
        )
    return next(iter(told), None)


def per_expert_shapes(source: TensorSource, shape: Qwen3VLShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the tensors of ``source``, in whichever layout, have as ``per_expert``."""
    experts = shape.text.experts
    found: dict[str, tuple[int, ...]] = {}
    for name, held in source.shapes().items():
        fused = _FUSED.search(name)
        if fused is None or experts is None:
            found[name] = held
            continue
        inward, outward = (experts.width, shape.text.hidden), (shape.text.hidden, experts.width)
        parts = {"down": outward} if fused[1] == "down_proj" else {"gate": inward, "up": inward}
        stem = name.removesuffix(f".{fused[1]}")
        found |= {f"{stem}.{e}.{part}_proj.weight": size for e in range(experts.count) for part, size in parts.items()}
    return found


def _layouts_of(name: str, held: tuple[int, ...], hidden: int, experts: ExpertSizes) -> tuple[ExpertLayout, ...]:
    """Every layout that has a tensor of this name and shape."""
    if _SINGLE.search(name):
        return ("per_expert",)
    found = _FUSED.search(name)
    if found is None:
        return ()
    rows, columns = (2 * experts.width, hidden) if found[1] == "gate_up_proj" else (hidden, experts.width)
    fused: Mapping[ExpertLayout, tuple[int, ...]] = {
        "transformers": (experts.count, rows, columns),
        "hub": (experts.count, columns, rows),
    }
    return tuple(layout for layout, expected in fused.items() if held == expected)
