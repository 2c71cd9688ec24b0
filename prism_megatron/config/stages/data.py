"""What a run trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, ExistingFolder, OnResume

STRUCTURED_SYSTEM_PROMPT = (
    "You are a helpful scientific assistant. Answer the question from the image. "
    "Your output must strictly follow this XML format and contain nothing else:\n"
    "<caption>\nbullet points on the style of the image, its key objects and its text\n</caption>\n"
    "<think>\nstep-by-step reasoning\n</think>\n"
    "<answer>the final answer only</answer>"
)
"""The structured-output instruction; training, rollout and evaluation use one and the same."""

CheckImages = Literal["headers", "all", "off"]
OnBad = Literal["fail", "skip"]


@dataclass(frozen=True)
class DataConfig:
    """Records with references, and how they become tokens."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    data: Annotated[Path | None, ExistingFolder()] = None
    """folder of records with images and references; without it the mini world's scenes"""
    check_images: Annotated[CheckImages, OnResume.FREE] = "headers"
    """what is read of every image before the first step: headers, which find missing files and measure prompts; all of
    it, which finds damaged pixels too and costs as much as an epoch's images do, shared by the ranks; or off, nothing,
    where a long prompt or a bad image is an error at its step"""
    on_bad: OnBad = "fail"
    """what is done about bad records: fail before the first step, or skip them, counted by reason; to skip needs
    --check-images all, because which records are kept decides on the order of all steps"""
    system_prompt: str | None = STRUCTURED_SYSTEM_PROMPT
    """system message before every question; None for none"""
    min_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """smaller images are enlarged to this area, in training and rollouts alike; by default the model's own limit"""
    max_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """larger images are shrunk to this area, in training and rollouts alike; by default the model's own limit"""
    max_prompt_tokens: Annotated[int, AT_LEAST_ONE] = 2048
    """longer prompts, image tokens included, are filtered out"""
    max_response_tokens: Annotated[int, AT_LEAST_ONE] = 6144
    """sampling stops here; longer references are filtered out"""
    strict_format: bool = True
    """exactly one of each tag, in order, no empty body, nothing outside; off: PRISM's released, lax rule"""
    format_sft: Annotated[int, NOT_NEGATIVE] = 0
    """supervised steps on the data's training part before the game, so that answers have the asked format"""
    format_sft_lr: Annotated[float, POSITIVE] = 1e-5
    """peak learning rate of these steps"""
