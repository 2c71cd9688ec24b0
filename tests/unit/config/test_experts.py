"""Expert layers are refused layouts they cannot be cut into, and every value offered would do."""

from __future__ import annotations

import dataclasses
import re

import pytest

from prism_megatron.config.engine.experts import ExpertSizes, PolicyExpertsConfig, check_policy_experts
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.validate_layout import check_layout
from prism_megatron.config.presets import preset
from prism_megatron.errors import ConfigError

SIZES = ExpertSizes(count=6, per_token=2, width=20)


@pytest.mark.parametrize(
    ("parallel", "flag", "offered"),
    [
        (ParallelConfig(ep=4), "ep", [1, 2, 3, 6]),
        (ParallelConfig(etp=3), "etp", [1, 2, 4, 5, 10, 20]),
        (ParallelConfig(tp=8), "etp", [1, 2, 4, 5, 10, 20]),
    ],
)
def test_what_would_do_is_named_and_does(parallel: ParallelConfig, flag: str, offered: list[int]) -> None:
    with pytest.raises(ConfigError, match=rf"use --{flag} ") as caught:
        SIZES.check_layout(parallel)
    found = [int(number) for number in re.findall(r"\d+", str(caught.value).split(f"use --{flag} ")[1])]
    assert found == offered
    for value in found:
        SIZES.check_layout(ParallelConfig(ep=value) if flag == "ep" else ParallelConfig(tp=parallel.tp, etp=value))


def test_sequence_parallelism_is_needed_at_tp() -> None:
    for size in ("auto", "on"):
        SIZES.check_layout(ParallelConfig(tp=2, sp=size))
    SIZES.check_layout(ParallelConfig(sp="off"))
    with pytest.raises(ConfigError, match=r"--sp off cannot work at --tp 2: .* use --sp auto or on"):
        SIZES.check_layout(ParallelConfig(tp=2, sp="off"))


def test_a_policy_with_experts_takes_ep_without_a_discriminator() -> None:
    """Claim: the dense width that its config states and nothing uses restricts no tp."""
    shape = preset("30B-A3B")
    shape = dataclasses.replace(shape, text=dataclasses.replace(shape.text, ffn=7))
    check_layout(ParallelConfig(tp=4, ep=8), shape, experts_per_tower=0)
    with pytest.raises(ConfigError, match="--ep 3 does not divide the 128 experts"):
        check_layout(ParallelConfig(ep=3), shape, experts_per_tower=0)


@pytest.mark.parametrize(
    ("losses", "experts", "frozen", "complaint"),
    [
        (PolicyExpertsConfig(0.01), None, False, "--moe-aux-loss-coeff 0.01 is for models with experts"),
        (PolicyExpertsConfig(0.0, 0.01), None, False, "--moe-z-loss-coeff 0.01 is for models with experts"),
        (PolicyExpertsConfig(0.01), ExpertSizes(8, 2, 4), True, "leave it or --freeze router out"),
        (PolicyExpertsConfig(0.01), ExpertSizes(2, 2, 4), False, "the loss is constant"),
    ],
)
def test_losses_of_routers_that_cannot_learn_are_refused(
    *, losses: PolicyExpertsConfig, experts: ExpertSizes | None, frozen: bool, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_policy_experts(losses, experts, frozen=frozen)
    check_policy_experts(PolicyExpertsConfig(), experts, frozen=frozen)
    check_policy_experts(PolicyExpertsConfig(0.01, 0.01), ExpertSizes(8, 2, 4), frozen=False)
