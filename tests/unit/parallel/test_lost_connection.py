"""Errors of real gloo groups and stores, made by ranks in threads: which of them mean that a rank is gone.

Blind spot: NCCL, of whose words only what its source says is known.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prism_megatron.parallel.lost_connection import lost_connection


def two_ranks(timeout: timedelta) -> list[Any]:
    """Groups, of which torch's types know no collectives."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not mark its re-exports
    with ThreadPoolExecutor(2) as ranks:
        return list(ranks.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, timeout), range(2)))


def error_of(work: Callable[[], object]) -> Exception:
    with pytest.raises(RuntimeError) as caught:
        work()
    return caught.value


def test_a_rank_whose_connection_closes_is_lost() -> None:
    groups = two_ranks(timedelta(seconds=60))
    groups.pop()
    said = lost_connection(error_of(lambda: groups[0].allreduce([torch.ones(1)]).wait()))
    assert said is not None and said.startswith("Connection closed by peer ["), said


def test_a_rank_that_is_waited_for_in_vain_is_lost() -> None:
    groups = two_ranks(timedelta(milliseconds=100))
    error = error_of(lambda: groups[0].allreduce([torch.ones(1)]).wait())
    assert lost_connection(error) == "Timed out waiting 100ms for recv operation to complete"


def test_a_store_that_never_answers_is_lost() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not mark its re-exports
    with pytest.raises(dist.DistStoreError) as caught:
        store.wait(["never"], timedelta(milliseconds=10))
    assert lost_connection(caught.value) is not None
    remote = dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL 2")
    assert lost_connection(remote) is not None


@pytest.mark.parametrize(
    "error",
    [
        KeyError("timed out"),
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        dist.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error, NCCL version 2"),
        RuntimeError("a bug\nTimed out waiting 100ms"),
    ],
)
def test_another_error_is_not(error: Exception) -> None:
    """Claim: what is wrong here keeps its traceback."""
    assert lost_connection(error) is None
