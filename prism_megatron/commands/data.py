"""Check, count, convert and shard sets of records: ``prism-data check PATH``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.data_tool import (
    CheckSetConfig,
    ConvertSetConfig,
    EnergonStateConfig,
    OnBad,
    SetStatsConfig,
    ShardSetConfig,
)
from prism_megatron.engine.launch import USER_ERROR, report_error
from prism_megatron.errors import PrismError


def say(text: str) -> None:
    """A line of the answer."""
    print(text, flush=True)


def check(config: CheckSetConfig) -> int:
    from prism_megatron.jobs.check_set import check_set

    return status(check_set(config, say=say), config.on_bad)


def stats(config: SetStatsConfig) -> int:
    from prism_megatron.jobs.set_stats import set_stats

    return status(set_stats(config, say=say), config.on_bad)


def convert(config: ConvertSetConfig) -> int:
    from prism_megatron.jobs.write_set import convert_set

    convert_set(config, say=say)
    return 0


def shard(config: ShardSetConfig) -> int:
    from prism_megatron.jobs.write_set import shard_set

    shard_set(config, say=say)
    return 0


def energon_state(config: EnergonStateConfig) -> int:
    from prism_megatron.data.formats.energon_state import refuse_other_layout

    state = refuse_other_layout(config.path, ranks=config.ranks, workers=config.workers)
    say(f"{config.path}: Energon goes on at {state.ranks} ranks with {state.workers} workers each")
    return 0


COMMANDS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "check": (CheckSetConfig(), check),
    "stats": (SetStatsConfig(), stats),
    "convert": (ConvertSetConfig(), convert),
    "shard": (ShardSetConfig(), shard),
    "energon-state": (EnergonStateConfig(), energon_state),
}
"""The configuration that flags are laid over, and what is done with it; it returns the exit status."""


def status(bad: int, on_bad: OnBad) -> int:
    """Of a command that looked at every record."""
    return USER_ERROR if bad and on_bad == "fail" else 0


def usage() -> str:
    lines = [f"  {name:<14} {type(defaults).__doc__}" for name, (defaults, _) in COMMANDS.items()]
    return "\n".join(["usage: prism-data COMMAND [flags]; COMMAND --help lists the flags", *lines])


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
        return run(parse_over(defaults, arguments, description=type(defaults).__doc__ or "", prog=f"prism-data {name}"))
    except PrismError as error:
        return report_error(error)
