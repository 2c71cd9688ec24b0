"""What a verification found, as text and as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prism_megatron.parity.compare import REPLICA_TOLERANCE, Difference, Tolerance

GIB = 2**30


@dataclass(frozen=True)
class Report:
    """``mode`` says whether layers were compared one by one; ``options`` what else the run was asked to do.

    ``output`` is what was compared beside gradients: a policy's logits, or a discriminator's scores.

    ``spread`` is how far copies of a replicated gradient differ; ``peak_bytes`` is the most that one process held.
    """

    mode: str
    output: Literal["logits", "scores"]
    layout: Mapping[str, int]
    options: tuple[str, ...]
    dtype: str
    packing: str
    num_samples: int
    num_tokens: int
    num_images: int
    difference: Difference
    tolerance: Tolerance
    spread: float
    peak_bytes: int

    @property
    def ok(self) -> bool:
        """Within tolerance, and replicated gradients are equal on all ranks."""
        return self.difference.within(self.tolerance) and self.spread <= REPLICA_TOLERANCE

    def text(self) -> str:
        """Every parameter's gradient error, the worst first, and the figures that decide at the end."""
        found = self.difference
        layout = " ".join(f"{name}{size}" for name, size in self.layout.items())
        what = f"{self.num_samples} samples of {self.num_tokens} tokens and {self.num_images} images"
        lines = [
            "relative error of every parameter's gradient",
            *(f"  {error:.2e}  {name}" for name, error in found.gradients),
            f"{self.mode}: {', '.join((layout, *self.options, self.dtype, self.packing))}; {what}",
            f"{self.output}       largest error {found.logits_max_abs:.2e}, limit {self.tolerance.logits:.2e}",
            *([f"next token   {found.token_agreement:.2%} agree"] if self.output == "logits" else []),
            f"gradients    worst {found.worst[1]:.2e}, limit {self.tolerance.gradients:.2e}  {found.worst[0]}",
            f"peak memory  {self.peak_bytes / GIB:.2f} GiB in one process",
        ]
        if self.spread:
            lines.append(f"copies of replicated gradients differ between ranks by {self.spread:.2e}")
        return "\n".join([*lines, "the same model" if self.ok else "NOT THE SAME MODEL"])

    def as_json(self) -> str:
        """One line; ``tolerance`` holds ``logits`` or ``scores`` (absolute) and ``gradients`` (relative)."""
        found = self.difference
        agreement = {"token_agreement": found.token_agreement} if self.output == "logits" else {}
        return json.dumps(
            {
                "ok": self.ok,
                "mode": self.mode,
                "layout": dict(self.layout),
                "options": list(self.options),
                "dtype": self.dtype,
                "packing": self.packing,
                f"{self.output}_max_abs": found.logits_max_abs,
                **agreement,
                "grad_max_rel": found.worst[1],
                "worst_parameter": found.worst[0],
                "tolerance": {self.output: self.tolerance.logits, "gradients": self.tolerance.gradients},
                "replica_spread": self.spread,
                "peak_bytes": self.peak_bytes,
            }
        )
