#!/usr/bin/env python
"""Makes demonstrations of problems: ``python tools/curate.py --config RECIPE --output FOLDER``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("curate"))
