"""Which versions of Transformer Engine the code is written for, checked where it is asked for, before ranks start."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.errors import ConfigError

LEAST, BELOW = "2.3", "3"
"""megatron-core 0.16.1 asks for 2.3 where it makes FP8 scales of a tensor or a block (``fp8_utils.py``); a third major
version nobody has seen. ``make te-check`` binds our calls to 2.20.2."""

PACKED_ALL_GATHER = "2.20"
"""Known to take packed sequences with keys and values gathered; 2.11 refuses them."""


FUSED_ROUTER = "2.7"
"""megatron-core looks for the fused choice of experts from here on (``extensions/transformer_engine.py``)."""


def installed_transformer_engine() -> str | None:
    """Its version; None where it is not installed. Whether it loads is not known."""
    try:
        return version("transformer-engine")
    except PackageNotFoundError:
        return None


def is_at_least(found: str, least: str) -> bool:
    """Whether a version is that one, or a later one."""
    return _numbers(found) >= _numbers(least)


def why_unfit(found: str) -> str | None:
    """None, or why Transformer Engine ``found`` is not used."""
    if _numbers(LEAST) <= _numbers(found) < _numbers(BELOW):
        return None
    return f"Transformer Engine {found} is here, and the code is written for {LEAST} and later, below {BELOW}"


def check_transformer_engine(
    flag: str, parallel: ParallelConfig, *, asked: bool, packs: bool, found: str | None
) -> None:
    """Raise ConfigError where ``flag`` asks for Transformer Engine and the version ``found`` cannot do what is wanted.

    ``packs`` says whether a row holds several sequences. One that is missing is named by ``capabilities.choose``,
    together with what else is.
    """
    if found is None or not asked:
        return
    if (problem := why_unfit(found)) is not None:
        raise ConfigError(f"{flag}: {problem}; install such a version, or use --fp8 none --transformer-engine auto")
    gathers = parallel.cp > 1 and parallel.cp_comm == "all_gather"
    if gathers and packs and _numbers(found) < _numbers(PACKED_ALL_GATHER):
        raise ConfigError(
            f"{flag} with --cp {parallel.cp} --cp-comm all_gather and packed sequences needs Transformer Engine "
            f"{PACKED_ALL_GATHER} or newer, and {found} is here; use --cp-comm a2a"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The release's numbers: ``2.20.2+cu13`` gives (2, 20, 2)."""
    release = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, release[0].split("."))) if release is not None else ()
