"""Serve a model with SGLang: ``prism-serve --load runs/first``."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence

from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import PrismError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        arguments = sys.argv[1:] if argv is None else argv
        config = parse_over(ServeConfig(), arguments, description=ServeConfig.__doc__ or "")
        from prism_megatron.jobs.serve import serve

        serve(config, say=lambda text: print(text, flush=True), stop=stop)
    except PrismError as error:
        return report_error(error)
    return 0
