#!/usr/bin/env python
"""Checks, counts, converts and shards sets of records: ``python tools/data.py check FOLDER``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("data"))
