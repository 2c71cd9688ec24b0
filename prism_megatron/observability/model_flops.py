"""What a step computes, counted from real lengths: the one place of the arithmetic.

Multiply-adds of a forward pass, of which each is two FLOPs. With width H, layers L, heads h of size d (k of them for
keys and values), F the width of the MLP (of the experts that see a token, together), V words::

    a token        L (H d (2 h + 2 k) + 3 H F + H E)      projections and gated MLP; the router's E logits
    a pair         L 2 h d                                a query with a key: their product, and what it weighs
    a label        H V                                    the output layer computes labelled positions alone
    a patch        D v + depth (4 v² + 2 v f)             the vision tower, v wide with MLPs f wide; D values in a patch
    a patch pair   depth 2 v                              patches of one frame see one another
    a merged row   (1 + taps) (J² + J H), J = merge² v    the projector: the merger, and one for each DeepStack tap

A causal sequence of n tokens has n (n + 1) / 2 pairs. Backward takes twice as much again where weights and inputs need
gradients, so the language tower and the output layer count three times; a tower that is frozen counts once, and one
whose features come from disk not at all. What is recomputed is not counted: these are the model's FLOPs. Norms,
activations, rotary angles and the optimizer are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

from prism_megatron.config.architecture.model import FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape

PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250.0,
}
"""Dense bf16 of NVIDIA's datasheets (half of what they state with sparsity), by the beginning of the device's name."""


@dataclass(frozen=True)
class Work:
    """What a forward pass goes through."""

    tokens: float = 0
    pairs: float = 0
    labels: float = 0
    patches: float = 0
    patch_pairs: float = 0
    merged: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Work)))


def work_of(num_tokens: int, num_labels: int, grids: Sequence[tuple[int, int, int]], *, merge: int) -> Work:
    """Of one sequence; ``grids`` are frames, rows and columns of patches of its images."""
    frames = [(count, height * width) for count, height, width in grids]
    patches = sum(count * size for count, size in frames)
    return Work(
        tokens=num_tokens,
        pairs=num_tokens * (num_tokens + 1) / 2,
        labels=num_labels,
        patches=patches,
        patch_pairs=sum(count * size**2 for count, size in frames),
        merged=patches / merge**2,
    )


@dataclass(frozen=True)
class Arithmetic:
    """Multiply-adds of a forward pass, for one of each kind of ``Work``."""

    token: float
    pair: float
    label: float
    patch: float
    patch_pair: float
    merged: float

    @classmethod
    def of(cls, shape: Qwen3VLShape) -> Arithmetic:
        text, vision = shape.text, shape.vision
        width = text.ffn if text.experts is None else text.experts.per_token * text.experts.width
        layer = text.hidden * text.head_dim * (2 * text.heads + 2 * text.kv_heads) + 3 * text.hidden * width
        joined = vision.hidden * vision.merge**2
        return cls(
            token=text.num_layers * (layer + text.hidden * text.num_experts),
            pair=text.num_layers * 2 * text.heads * text.head_dim,
            label=text.hidden * text.vocab,
            patch=vision.patch_dim * vision.hidden
            + vision.depth * (4 * vision.hidden**2 + 2 * vision.hidden * vision.ffn),
            patch_pair=vision.depth * 2 * vision.hidden,
            merged=(1 + len(vision.taps)) * (joined**2 + joined * vision.out_hidden),
        )

    def language(self, work: Work) -> float:
        """Of the language tower and the output layer."""
        return self.token * work.tokens + self.pair * work.pairs + self.label * work.labels

    def tower(self, work: Work) -> float:
        """Of the vision tower without its projector."""
        return self.patch * work.patches + self.patch_pair * work.patch_pairs

    def projector(self, work: Work) -> float:
        return self.merged * work.merged

    def training_flops(self, work: Work, *, freeze: Collection[FreezeGroup], from_disk: float) -> float:
        """Of forward and backward, where a share ``from_disk`` of the images needs no tower and no projector."""
        vision = self.tower(work) * (1 if "vision" in freeze else 3)
        projector = self.projector(work) * (1 if {"vision", "projector"} <= set(freeze) else 3)
        return 2 * (3 * self.language(work) + (1.0 - from_disk) * (vision + projector))


def peak_of(device_name: str) -> float | None:
    """TFLOP/s in dense bf16 of a device, as torch names it; None where it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if device_name.startswith(name)), None)
