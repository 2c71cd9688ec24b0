"""What the format is taught from (blind spot: whether a model learns it)."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.loader import Example, reference_of
from prism_megatron.data.records import Record
from prism_megatron.data.render import Renderer
from prism_megatron.training.format_sft import abridged


@pytest.mark.parametrize(("solution", "reasoning"), [("First.\nThen two.\n", "Then two."), (None, "two")])
def test_a_demonstration_is_one_line_of_each(solution: str | None, reasoning: str) -> None:
    """Claim: first line of the caption, last of the solution; where there is none the answer stands in its place."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    record = Record("r", Path("x"), "q", None, "two", solution, " A box.\n- a dot\n", "set")
    reference = reference_of(record, renderer)
    assert reference is not None
    example = Example(renderer.prompt("r", "q", []), reference, record=record)
    assert abridged(example, renderer) == renderer.response("A box.", reasoning, "two")
