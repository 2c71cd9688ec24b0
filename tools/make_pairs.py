#!/usr/bin/env python
"""Preference pairs of references and answers: ``python tools/make_pairs.py --data A --answers B.jsonl --output C``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("make_pairs"))
