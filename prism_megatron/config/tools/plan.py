"""The configuration of ``prism-plan``, beside the flags of the stage that is planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, Range


@dataclass(frozen=True)
class PlanConfig:
    """What does a run need, how long does it take at least, and which layouts fit (docs/plan.md)?

    With the name of a stage first (sft, align, rlvr) all other flags are those of that stage, and its layout is
    planned. Without, the paper's three stages are planned for --model, and layouts are searched for.
    """

    gpu: str = "h100-80"
    """the device, by its name in the table of docs/plan.md"""
    gpus: Annotated[int | None, AT_LEAST_ONE] = None
    """how many; by default the fewest that the layout takes, and 8 where layouts are searched for"""
    layouts: Annotated[int, NOT_NEGATIVE] = 0
    """how many layouts that fit to name, the fastest first, beside the one that a stage's flags ask for"""
    play: bool = True
    """count memory by playing each role's step on tensors without contents; off: arithmetic alone, at once"""
    share_of_roof: Annotated[float, Range(above=0, at_most=1)] = 0.4
    """what part of the roofs real steps are taken to reach, for hours: public runs report 0.36 to 0.52"""
    json: bool = False
    """print one JSON object in place of tables"""


@dataclass(frozen=True)
class SizesConfig(PlanConfig):
    """What the paper's three stages need of a model that is named by its size (docs/plan.md)."""

    model: tuple[str, ...] = ("4B",)
    """published sizes: 2B, 4B, 8B, 32B, 30B-A3B, 235B-A22B"""
    judge: str = "2B"
    """published dense size that the discriminator is made of (paper: 2B for every policy)"""
    smallest: bool = False
    """find the smallest number of GPUs of each stage, a power of two, in place of a plan of --gpus"""
