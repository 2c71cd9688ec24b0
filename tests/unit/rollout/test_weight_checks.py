"""Which sets of weights are a model's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.weight_checks import TIED_NAME, WeightCheck

SHAPES = {"embed": (4, 2), "norm": (2,), "vision": (3,), TIED_NAME: (4, 2)}
ALL = tuple(SHAPES)


def weights(*names: str) -> list[tuple[str, Tensor]]:
    return [(name, torch.zeros(SHAPES[name])) for name in names]


def refusal(check: WeightCheck, names: Sequence[str], left_out: frozenset[str] = frozenset()) -> str:
    """What is said of weights as they pass and as they are announced, which is the same; empty where they may."""
    said = []
    for passes in (
        lambda: list(check.passed(weights(*names), left_out=left_out)),
        lambda: check.check_names({name: SHAPES[name] for name in names}, left_out=left_out),
    ):
        try:
            passes()
            said.append("")
        except WeightSyncError as error:
            said.append(str(error))
    assert said[0] == said[1]
    return said[0]


def test_only_a_tied_models_head_may_be_missing() -> None:
    tied, untied = WeightCheck(SHAPES, tied=True), WeightCheck(SHAPES, tied=False)
    assert not refusal(tied, ALL) and not refusal(untied, ALL)
    assert not refusal(tied, ("embed", "norm", "vision"))
    assert refusal(untied, ("embed", "norm", "vision")).endswith(
        f"1 of 4 weights of the rollout model were not sent: {TIED_NAME}"
    )
    for check in (tied, untied):
        assert "were not sent: embed" in refusal(check, ("norm", "vision", TIED_NAME))


def test_a_tied_head_may_come_to_a_model_that_has_none() -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != TIED_NAME}
    assert not refusal(WeightCheck(shapes, tied=True), ALL)
    assert f"no weight {TIED_NAME!r}" in refusal(WeightCheck(shapes, tied=False), ALL)


def test_a_name_may_come_once_the_tied_heads_too() -> None:
    without = {name: shape for name, shape in SHAPES.items() if name != TIED_NAME}
    for shapes in (SHAPES, without):
        for twice in ("norm", TIED_NAME):
            with pytest.raises(WeightSyncError, match="was sent twice"):
                list(WeightCheck(shapes, tied=True).passed(weights(*ALL, twice), left_out=frozenset()))


def test_what_is_left_out_is_not_missing_and_all_else_is() -> None:
    check = WeightCheck(SHAPES, tied=False)
    assert not refusal(check, ("embed", "norm", TIED_NAME), frozenset({"vision"}))
    assert "were not sent: norm" in refusal(check, ("embed", TIED_NAME), frozenset({"vision"}))


def test_repeated_and_misshapen_weights_stop_where_they_stand() -> None:
    check = WeightCheck(SHAPES, tied=False)
    passing = check.passed([*weights("norm", "norm")], left_out=frozenset())
    assert next(passing)[0] == "norm"
    with pytest.raises(WeightSyncError, match="'norm' was sent twice"):
        next(passing)
    for announced in ((2, 4), (8,), ()):
        with pytest.raises(WeightSyncError, match="'embed' has shape"):
            check.check_names({**SHAPES, "embed": announced}, left_out=frozenset())
