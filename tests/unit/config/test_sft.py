"""Flags that say how often sources are seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prism_megatron.config.stages.demonstrations import DemonstrationsConfig
from prism_megatron.config.stages.sft import times_of, weights_of
from prism_megatron.errors import ConfigError


def test_sources_have_numbers() -> None:
    data = DemonstrationsConfig(repeats=("a/b=0.5", "c=2"))
    assert times_of(data) == {"a/b": 0.5, "c": 2.0} and weights_of(data) == {}
    assert weights_of(DemonstrationsConfig(weights=("a=b=3", "c=0"))) == {"a=b": 3.0, "c": 0.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"repeats": ("a",)}, "--repeats a: SOURCE=TIMES expected"),
        ({"repeats": ("=1",)}, "--repeats =1: SOURCE=TIMES expected"),
        ({"weights": ("a=x",)}, "--weights a=x: SOURCE=WEIGHT expected"),
        ({"weights": ("a=-1",)}, "--weights a=-1: SOURCE=WEIGHT expected"),
        ({"weights": ("a=inf",)}, "--weights a=inf: SOURCE=WEIGHT expected"),
        ({"weights": ("a=nan",)}, "--weights a=nan: SOURCE=WEIGHT expected"),
        ({"weights": ("a=1", "a=2")}, "--weights names 'a' twice"),
        ({"weights": ("a=0", "b=0")}, "--weights gives every source the weight 0"),
        ({"weights": ("a=1",), "repeats": ("a=1",)}, "--weights and --repeats both say how often sources are seen"),
    ],
)
def test_other_numbers_are_refused(flags: dict[str, Any], message: str) -> None:
    numbers = weights_of if "weights" in flags else times_of
    with pytest.raises(ConfigError, match=message):
        numbers(replace(DemonstrationsConfig(), **flags))
