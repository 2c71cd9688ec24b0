#!/usr/bin/env python
"""The command ``prism_megatron.commands.data`` from a checkout, which need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.commands.data import main

if __name__ == "__main__":
    sys.exit(main())
