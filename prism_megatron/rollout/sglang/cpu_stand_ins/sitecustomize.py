"""On a server process's PYTHONPATH where CUDA is absent: Python imports this before anything else.

Patch 1 of 2 (the other is ``sgl_kernel``). Upstream place: ``torchvision/_meta_registrations.py``, which registers
fake kernels for the operators of its compiled extension when it is imported. Versions: torchvision 0.28.0 from the
package index beside a CPU build of torch 2.13.0. Reason: that wheel's extension is built for CUDA and cannot be loaded
here, so its operators do not exist and importing torchvision fails with ``operator torchvision::nms does not exist``.
SGLang needs torchvision's transforms, never its operators. Until: a CPU wheel of torchvision is installed.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision is first imported; torch is not imported earlier than it was."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for schema in _SCHEMAS:
                torch.library.define(f"torchvision::{schema.split('(')[0]}", schema[schema.index("(") :])
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
