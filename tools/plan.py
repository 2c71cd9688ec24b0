#!/usr/bin/env python
"""What a run needs and how long it takes at least: ``python tools/plan.py align --model 4B --tp 4 --gpus 8``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("plan"))
