#!/usr/bin/env python
"""Supervised fine-tuning, the first stage: ``torchrun tools/run_sft.py --tp 2 --pp 2``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("sft"))
