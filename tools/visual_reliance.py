#!/usr/bin/env python
"""How much a policy's words depend on images: ``torchrun tools/visual_reliance.py --model POLICY --data FOLDER``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("visual_reliance"))
