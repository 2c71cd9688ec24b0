"""A world of one rank in the test's own process, for engines whose layout does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from prism_megatron.engine.runtime import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Starts in milliseconds; what only several ranks can show is tested in ``tests/distributed``."""
    import torch.distributed as dist

    from prism_megatron.config.engine.parallel import ParallelConfig
    from prism_megatron.engine.runtime import start, stop

    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not mark its re-exports
    started = start(ParallelConfig(), seed=1, rank=0, world_size=1, store=store)
    yield started
    stop(started)
