"""Make preference pairs of references and answers: ``prism-make-pairs --data SET --answers FILE --output FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.make_pairs import MakePairsConfig, check_make_pairs
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import PrismError


def say(text: str) -> None:
    """A line of the answer."""
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        config = parse_over(
            MakePairsConfig(), sys.argv[1:] if argv is None else argv, description=MakePairsConfig.__doc__ or ""
        )
        places = check_make_pairs(config)
        from prism_megatron.jobs.make_pairs import make_pairs

        make_pairs(places, rejected=config.rejected, say=say)
    except PrismError as error:
        return report_error(error)
    return 0
