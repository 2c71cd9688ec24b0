#!/usr/bin/env python
"""All stages one after the other, each evaluated: ``python tools/run_pipeline.py --output RUN``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("pipeline"))
