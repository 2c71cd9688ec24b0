#!/usr/bin/env python
"""The command ``prism_megatron.commands.evaluate`` from a checkout, which need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
