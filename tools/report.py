#!/usr/bin/env python
"""Summary and report of a run from its files, or its table as it grows: ``python tools/report.py RUN --follow``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import run

if __name__ == "__main__":
    sys.exit(run("report"))
