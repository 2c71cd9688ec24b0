"""``--recompute auto``: what it may come to, and who refuses it because nothing settles it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.forecast import ForecastConfig, check_forecast
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.engine.speed import SpeedConfig
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.warm_start import WarmStartConfig, check_warm_start
from prism_megatron.config.tools.verify import VerifyConfig, check_verify
from prism_megatron.config.validate import check_align, check_recompute
from prism_megatron.engine.host.execution import execution_here
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError

AUTO = RecomputeConfig("auto")


@pytest.mark.parametrize(
    ("asked", "modules"), [((), ("mlp",)), (("core_attn",), ("core_attn",)), (("core_attn", "mlp"),) * 2]
)
def test_auto_comes_to_a_configuration_that_stands_by_itself(asked: tuple[str, ...], modules: tuple[str, ...]) -> None:
    """Claim: the order is none, selective with the modules that are named, full; modules stand with selective alone, so
    that a run may go on with what was settled; the vision tower's flag stays."""
    auto = RecomputeConfig("auto", asked, recompute_vision=True)  # type: ignore[arg-type]  # names of modules
    check_recompute(auto)
    assert auto.by_arithmetic() == (
        RecomputeConfig("none", (), recompute_vision=True),
        RecomputeConfig("selective", modules, recompute_vision=True),  # type: ignore[arg-type]  # names of modules
        RecomputeConfig("full", (), recompute_vision=True),
    )
    for settled in auto.by_arithmetic():
        check_recompute(settled)
    again = replace(auto.by_arithmetic()[1], recompute="auto")
    assert again.by_arithmetic() == auto.by_arithmetic()


@pytest.mark.parametrize(
    "refuse",
    [
        lambda shape: check_warm_start(WarmStartConfig(steps=1, recompute=AUTO), shape, world_size=1),
        lambda shape: check_verify(VerifyConfig(recompute=AUTO), shape, world_size=1),
        lambda _shape: check_forecast(ForecastConfig("off"), AUTO),
        lambda _shape: execution_here(
            AUTO, PrecisionConfig(), SpeedConfig(), world=cast("World", None), dtype=torch.float32, say=print
        ),
    ],
    ids=["prism-warm-start", "prism-verify", "--forecast off", "a stage called without its command"],
)
def test_auto_is_refused_where_nothing_settles_it(refuse: Callable[[Qwen3VLShape], object], mini: Qwen3VLShape) -> None:
    with pytest.raises(
        ConfigError, match=r"--recompute auto is settled by a forecast.*name --recompute none, selective or"
    ):
        refuse(mini)


def test_an_alignment_may_leave_it_open(mini: Qwen3VLShape) -> None:
    check_align(AlignConfig(recompute=AUTO), mini, world_size=1)
