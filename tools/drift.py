#!/usr/bin/env python
"""How far responses are from those of others: ``python tools/drift.py A.jsonl --against base=B.jsonl``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("drift"))
