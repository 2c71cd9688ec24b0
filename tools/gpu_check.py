#!/usr/bin/env python
"""Does this run on this GPU as it does on the CPU, and how fast? ``make gpu-check`` (docs/gpu.md)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.gpu_check import GpuCheckConfig, check_gpu_check
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import PrismError
from prism_megatron.terminal import guarded


def main() -> int:
    """Exit status 0 where nothing failed, 1 where something did, 2 for input that cannot work."""
    try:
        config = parse_over(GpuCheckConfig(), sys.argv[1:], description=__doc__ or "")
        import torch

        check_gpu_check(config, has_cuda=torch.cuda.is_available())
        from prism_megatron.gpu_check.run import run_checks

        return 0 if run_checks(config) else 1
    except PrismError as error:
        return report_error(error)


if __name__ == "__main__":
    sys.exit(guarded(main))
