"""AdamW and its schedule, for one role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, OnResume, Range


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay. Defaults are those of PRISM's alignment (both players)."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    lr: Annotated[float, NOT_NEGATIVE] = 1e-6
    """peak learning rate"""
    min_lr_ratio: Annotated[float, SHARE] = 0.0
    """final learning rate of the cosine schedule, as a share of lr"""
    schedule: Literal["constant", "cosine"] = "constant"
    """shape after warm-up"""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """linear warm-up from 0, in optimizer steps"""
    warmup_ratio: Annotated[float, SHARE] = 0.0
    """the same as a share of all steps, where warmup_steps is 0"""
    beta1: Annotated[float, Range(at_least=0, below=1)] = 0.9
    """first-moment decay"""
    beta2: Annotated[float, Range(at_least=0, below=1)] = 0.999
    """second-moment decay"""
    eps: Annotated[float, POSITIVE] = 1e-8
    """AdamW epsilon"""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    """decoupled weight decay, on all parameters"""
    clip_grad: Annotated[float, NOT_NEGATIVE] = 1.0
    """global gradient-norm clip; 0 turns clipping off"""
    offload: Annotated[bool, OnResume.FREE] = False
    """after an update, release gradient buffers and keep optimizer state in host memory until the next backward pass"""

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of 0-based optimizer step ``step`` in a run of ``total_steps``."""
        warmup_steps = self.warmup_steps or round(self.warmup_ratio * total_steps)
        if step < warmup_steps:
            return self.lr * (step + 1) / warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        floor = self.lr * self.min_lr_ratio
        return floor + (self.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
