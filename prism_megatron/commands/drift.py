"""How far are responses from those of others? ``prism-drift A.jsonl --against base=B.jsonl references=C.jsonl``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.drift import DriftConfig, check_drift
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import PrismError


def say(text: str) -> None:
    """A line of a table."""
    print(text, flush=True)


def tell(text: str) -> None:
    """A line for whoever watches, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        config = parse_over(
            DriftConfig(), sys.argv[1:] if argv is None else argv, description=DriftConfig.__doc__ or ""
        )
        check_drift(config)
        from prism_megatron.jobs.drift import measure_drift

        measure_drift(config, say=say, tell=tell)
    except PrismError as error:
        return report_error(error)
    return 0
