"""A kit for tests that need several ranks: one gloo world of processes, reused for many layouts.

Example::

    with GlooWorld(4) as gloo:
        losses = gloo.run(train_one_step, batch, parallel=ParallelConfig(tp=2, pp=2))   # one result per rank

``train_one_step(world, batch)`` is a function of a module: it is sent to the ranks by name, and so are its arguments.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prism_megatron.config.engine.parallel import ParallelConfig

_PRELOAD = (
    "pytest",
    "prism_megatron.engine.eager_megatron",
    "torch._dynamo",
    "prism_megatron.engine.engine",
    "model_providers.qwen3_vl.provider",
)
"""Imported once, in the fork server. pytest is there because every child re-imports the main module."""

_LATE = 0.9
"""Part of its time after which a rank writes where it is; what it waits for raises at the end of it."""


@dataclass(frozen=True)
class _Job:
    """One call, as it travels to a rank."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    parallel: ParallelConfig
    world_size: int
    seed: int
    rendezvous: str
    timeout_s: float


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


class GlooWorld:
    """``num_ranks`` processes that stay up between calls. Leaving the context ends them all."""

    def __init__(self, num_ranks: int, *, timeout_s: float = 240.0) -> None:
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self._processes: list[ForkServerProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_runs = 0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-world-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._folder is not None:
            self._folder.cleanup()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        parallel: ParallelConfig | None = None,
        num_ranks: int | None = None,
        seed: int = 1234,
    ) -> list[Any]:
        """``function(world, *arguments)`` on the first ``num_ranks`` ranks (default all), laid out as ``parallel``.

        Returns one result per rank. Raises RankError with the traceback of the first rank that raised, or
        TimeoutError after ``timeout_s``; after either the processes are ended, and the next call starts new ones.
        Where time was running out both say where every rank's threads were.
        """
        assert self._folder is not None, "GlooWorld is a context manager"
        if not self._processes:
            self._start()
        size = self.num_ranks if num_ranks is None else num_ranks
        rendezvous = str(Path(self._folder.name) / f"run-{self._num_runs}")
        self._num_runs += 1
        job = _Job(function, arguments, parallel or ParallelConfig(), size, seed, rendezvous, self.timeout_s)
        try:
            for pipe in self._pipes[:size]:
                pipe.send(job)
            return self._collect(size, rendezvous)
        except BaseException:
            self._end()
            raise

    def _start(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, list(sys.path)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _end(self) -> None:
        """A rank that waits for work leaves when its pipe closes; one that hangs in a collective is killed."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + 2.0
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _collect(self, size: int, rendezvous: str) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout_s
        while len(results) < size:
            pending = {self._pipes[rank]: rank for rank in range(size) if rank not in results}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending.values())} gave no answer within {self.timeout_s:.0f} s"
                                   + _late(size, rendezvous))  # fmt: skip
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending[pipe]
                try:
                    succeeded, value = pipe.recv()
                except EOFError:
                    raise RankError(f"rank {rank} died without an answer") from None
                if not succeeded:
                    raise RankError(f"rank {rank} of {size} raised:\n{value}{_late(size, rendezvous)}")
                results[rank] = value
        return [results[rank] for rank in range(size)]


def _stacks(rank: int, rendezvous: str) -> Path:
    """Where a rank writes what its threads are doing when its time runs out."""
    return Path(f"{rendezvous}-rank-{rank}.txt")


def _late(size: int, rendezvous: str) -> str:
    """What ranks wrote there."""
    files = [(rank, _stacks(rank, rendezvous)) for rank in range(size)]
    return "".join(f"\nrank {rank}: {text}" for rank, file in files if file.exists() and (text := file.read_text()))


def _serve(rank: int, pipe: Connection, path: list[str]) -> None:
    """A rank's life: run jobs until the parent closes the pipe or is gone."""
    sys.path[:] = path
    while True:
        try:
            job: _Job = pipe.recv()
        except (EOFError, OSError):
            return
        with _stacks(rank, job.rendezvous).open("w") as file:
            faulthandler.dump_traceback_later(_LATE * job.timeout_s, file=file)
            try:
                answer = (True, _run_job(rank, job))
            except BaseException:  # noqa: BLE001 - whatever it is, the parent raises it with this traceback
                answer = (False, traceback.format_exc())
            finally:
                faulthandler.cancel_dump_traceback_later()
        try:
            pipe.send(answer)
        except BrokenPipeError:  # the parent has given this world up
            return


def _run_job(rank: int, job: _Job) -> Any:
    import torch.distributed as dist

    from prism_megatron.engine.runtime import start, stop

    store = dist.FileStore(job.rendezvous, job.world_size)  # type: ignore[attr-defined]  # an unmarked re-export
    world = start(
        job.parallel,
        seed=job.seed,
        rank=rank,
        world_size=job.world_size,
        store=store,
        timeout=timedelta(seconds=job.timeout_s),
    )
    try:
        return job.function(world, *job.arguments)
    finally:
        stop(world)
