"""Which answers are right, by the rules of the rewards? ``prism-verify-answers FILE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.verify_answers import VerifyAnswersConfig, check_verify_answers
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import PrismError


def say(text: str) -> None:
    """A line of the answer."""
    print(text, flush=True)


def tell(text: str) -> None:
    """A line for whoever watches, apart from the answer."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        config = parse_over(
            VerifyAnswersConfig(), sys.argv[1:] if argv is None else argv, description=VerifyAnswersConfig.__doc__ or ""
        )
        check_verify_answers(config)
        from prism_megatron.jobs.verify_answers import verify_answers

        verify_answers(config, say=say, tell=tell)
    except PrismError as error:
        return report_error(error)
    return 0
