#!/usr/bin/env python
"""Serve a checkpoint or a model folder with SGLang: ``python tools/serve.py --load runs/first/hf``."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.cli import parse_over
from prism_megatron.config.serve import ServeConfig
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import PrismError


def main() -> int:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        config = parse_over(ServeConfig(), sys.argv[1:], description=ServeConfig.__doc__ or "")
        from prism_megatron.jobs.serve import serve

        serve(config, say=lambda text: print(text, flush=True), stop=stop)
    except PrismError as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
