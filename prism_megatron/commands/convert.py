"""Convert checkpoints to and from Hugging Face folders: ``prism-convert to-megatron --hf MODEL --save DIR``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from prism_megatron.config.check import CheckConfig, InspectConfig
from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig
from prism_megatron.engine.launch import USER_ERROR, report_error
from prism_megatron.errors import PrismError


def say(text: str) -> None:
    """A line for the user."""
    print(text, file=sys.stderr, flush=True)


def to_megatron(config: ToMegatronConfig) -> int:
    from prism_megatron.jobs.convert import to_megatron as run

    run(config, say=say)
    return 0


def to_hf(config: ToHFConfig) -> int:
    from prism_megatron.jobs.convert import to_hf as run

    run(config, say=say)
    return 0


def check(config: CheckConfig) -> int:
    from prism_megatron.jobs.check_weights import check_weights

    found = check_weights(config)
    print(found.as_json() if config.json else found.text(), flush=True)
    return 0 if found.equal else 1


def inspect(config: InspectConfig) -> int:
    from prism_megatron.jobs.inspect_folder import inspect_folder, text

    facts = inspect_folder(config)
    print(json.dumps(facts, indent=2) if config.json else text(facts), flush=True)
    return 0


COMMANDS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "to-megatron": (ToMegatronConfig(), to_megatron),
    "to-hf": (ToHFConfig(), to_hf),
    "check": (CheckConfig(), check),
    "inspect": (InspectConfig(), inspect),
}
"""The configuration that flags are laid over, and what is done with it; it returns the exit status."""


def usage() -> str:
    lines = [f"  {name:<12} {type(defaults).__doc__}" for name, (defaults, _) in COMMANDS.items()]
    return "\n".join(["usage: prism-convert COMMAND [flags]; COMMAND --help lists the flags", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, arguments = (words[0] if words else ""), words[1:]
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        print(usage(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else USER_ERROR
    defaults, run = COMMANDS[name]
    try:
        return run(
            parse_over(defaults, arguments, description=type(defaults).__doc__ or "", prog=f"prism-convert {name}")
        )
    except PrismError as error:
        return report_error(error)
