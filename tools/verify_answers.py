#!/usr/bin/env python
"""Checks answers of a file against what is right: ``python tools/verify_answers.py FILE``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("verify_answers"))
