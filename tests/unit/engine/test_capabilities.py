"""What a run uses follows from what the machine has and the flags, and is named when something is missing.

Machines are made up. Blind spot: ``installed`` is run on this machine alone, so its answers for others are not seen.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.engine.host.capabilities import Capabilities, Installed, check_adam, choose, installed
from prism_megatron.errors import ConfigError

CPU = Installed(torch="2.13.0")
HOPPER = Installed("2.13.0", (9, 0), transformer_engine="2.20.2", apex=True, flash_attn="2.8.3")
BARE_GPU = Installed("2.13.0", (9, 0))
FP8 = PrecisionConfig(fp8="hybrid")


def uses(capabilities: Capabilities) -> dict[str, str]:
    return {choice.part: choice.uses for choice in capabilities.choices}


def test_transformer_engine_is_used_where_it_and_cuda_are() -> None:
    chosen = choose(HOPPER, FP8)
    assert (chosen.layers, chosen.adam) == ("te", "te")
    assert uses(chosen) == {
        "linear layers": "Transformer Engine 2.20.2",
        "norms": "Transformer Engine 2.20.2, fused",
        "core attention": "Transformer Engine 2.20.2",
        "experts": "Transformer Engine 2.20.2, grouped GEMM",
        "fp8": "hybrid, tensorwise scales",
        "output layer": "torch matmul",
        "Adam": "Transformer Engine 2.20.2 FusedAdam",
    }
    assert any("flash-attn 2.8.3" in line for line in chosen.lines())


@pytest.mark.parametrize(
    ("machine", "named"),
    [
        (CPU, ["Transformer Engine is not installed", "no CUDA device"]),
        (BARE_GPU, ["Transformer Engine is not installed"]),
        (Installed("2.13.0", None, transformer_engine="2.20.2"), ["no CUDA device"]),
    ],
)
def test_torch_is_used_elsewhere_and_the_missing_is_named(machine: Installed, named: list[str]) -> None:
    chosen = choose(machine, PrecisionConfig())
    assert chosen.layers == "torch"
    assert uses(chosen)["core attention"] == "torch scaled_dot_product_attention"
    assert all(any(missing in line for line in chosen.lines()) for missing in named)


def test_a_version_that_nothing_is_written_for_is_not_used() -> None:
    """It is named, as what is missing is; Adam is Megatron's own choice."""
    old = dataclasses.replace(HOPPER, transformer_engine="1.13.0")
    chosen = choose(old, PrecisionConfig())
    assert (chosen.layers, chosen.adam) == ("torch", "te")
    assert any("Transformer Engine 1.13.0 is here, and the code is written for 2.3" in line for line in chosen.lines())
    with pytest.raises(ConfigError, match=r"--fp8 hybrid needs .*Transformer Engine 1\.13\.0 is here"):
        choose(old, FP8)


def test_flash_attn_is_named_only_where_something_would_call_it() -> None:
    alone = Installed("2.13.0", (9, 0), flash_attn="2.8.3")
    assert not any("flash-attn" in line for line in choose(alone, PrecisionConfig()).lines())
    without = Installed("2.13.0", (9, 0), transformer_engine="2.20.2")
    assert any("no flash-attn" in line for line in choose(without, PrecisionConfig()).lines())


def test_transformer_engine_can_be_left_out_of_the_layers_but_not_of_adam() -> None:
    chosen = choose(HOPPER, PrecisionConfig(transformer_engine="off"))
    assert (chosen.layers, chosen.adam) == ("torch", "te")
    assert "--transformer-engine off" in chosen.lines()[0]


@pytest.mark.parametrize(("machine", "adam"), [(HOPPER, "te"), (Installed("2", apex=True), "apex"), (CPU, "torch")])
def test_adam_is_the_first_that_megatron_would_take(machine: Installed, adam: str) -> None:
    assert choose(machine, PrecisionConfig()).adam == adam


@pytest.mark.parametrize(
    ("machine", "precision", "complaint"),
    [
        (CPU, FP8, "--fp8 hybrid needs Transformer Engine and a CUDA device: Transformer Engine is not .* no CUDA"),
        (BARE_GPU, FP8, "--fp8 hybrid needs Transformer Engine"),
        (CPU, PrecisionConfig(transformer_engine="on"), "--transformer-engine on needs Transformer Engine"),
        (HOPPER, PrecisionConfig(fp8="e4m3", fp8_recipe="mxfp8"), r"mxfp8 needs compute capability 10\.0, .* has 9\.0"),
        (Installed("2", (8, 0), "2.20.2"), FP8, r"tensorwise needs compute capability 8\.9.* use --fp8 none"),
    ],
)
def test_fp8_that_would_be_ignored_or_cannot_run_is_refused(
    machine: Installed, precision: PrecisionConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        choose(machine, precision)


def test_this_machine_answers_for_itself_and_for_megatron() -> None:
    from megatron.core.optimizer import Adam

    here = installed()
    assert here.torch == torch.__version__
    assert (here.compute_capability is not None) == torch.cuda.is_available()
    made = Adam([torch.nn.Parameter(torch.zeros(1))])
    check_adam(choose(here, PrecisionConfig()), [made])


def test_another_adam_than_the_table_says_is_an_error() -> None:
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(RuntimeError, match=r"torch\.optim\.adamw\.AdamW where the table .* 'te'"):
        check_adam(choose(HOPPER, PrecisionConfig()), [made])
