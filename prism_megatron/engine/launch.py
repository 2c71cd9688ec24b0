"""From one command to a world of processes, and out of it again without leaving any behind.

A process that torchrun started as one of several is left alone. A single process that was asked for a larger
world starts the ranks itself: a fork server imports torch, megatron-core and transformers once (``PRELOAD``) and
the ranks are forked from it. Every process below the command dies with its parent, by the kernel's hand, so that
even a SIGKILL of the outer process leaves none.

Imports no torch: it runs in the tools before any rank exists.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

from prism_megatron.errors import ConfigError, PrismError

ConfigT = TypeVar("ConfigT")

USER_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
LAUNCHER_PID = "PRISM_LAUNCHER_PID"
"""Set for the fork server: the process it must not outlive."""

PRELOAD = (
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.models.common.language_module.language_module",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen2.tokenization_qwen2",
    "safetensors.torch",
)
"""Imported once, before the ranks are forked: nine seconds of CPU time that each rank would otherwise spend again.
The first optimizer step would import torch._dynamo. Nothing here may compute: a thread pool or a generator that a
module starts at import would be broken, or shared, in every rank."""

_HOST = "127.0.0.1"
_GRACE_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1


def launch(
    fn: Callable[[ConfigT], None],
    config: ConfigT,
    *,
    model_parallel_size: int,
    world_size: int | None = None,
    preload: Sequence[str] = PRELOAD,
) -> int:
    """Run ``fn(config)`` on every rank and return the exit status of the command.

    ``model_parallel_size`` is the number of processes one copy of the models takes; ``world_size`` (by default as many)
    is how many to start where there is one. ``fn`` must be importable by name. With WORLD_SIZE above 1 in the
    environment this process is a rank already, and ``fn`` runs in it. ``preload`` names the modules that forked ranks
    find imported; where a GPU is present none are, because CUDA does not survive a fork.

    A PrismError on a rank is printed once, in one line, with status 2; any other exception ends the world with one
    traceback and status 1.
    Raises ConfigError for a number of processes that the layout cannot use.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    present = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = world_size or model_parallel_size
    if present > 1 or wanted == 1:
        try:
            if present % model_parallel_size:
                raise ConfigError(
                    f"the layout takes a multiple of {model_parallel_size} processes, not {present}; "
                    f"use --nproc-per-node {model_parallel_size}, or leave it out"
                )
            quiet_vendors()
            fn(config)
        except PrismError as error:
            return report_error(error)
        return 0
    print(f"{wanted} processes are needed and this is one: starting {wanted} on this host", flush=True)
    return _run_world(fn, config, wanted, preload=() if _has_gpu() else (*preload, fn.__module__))


def report_error(error: PrismError) -> int:
    """Print the error in one line, once for all ranks of a torchrun, and return the exit status for it.

    Ranks usually fail alike. Rank 0 speaks at once; the others give torchrun a second to end them first.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(1.0)
    print(_one_line(error), file=sys.stderr, flush=True)
    return USER_ERROR


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel SIGKILL this process when its parent ends (Linux; elsewhere nothing does).

    ``parent_pid`` closes the gap in which the parent may have ended before the kernel was asked.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if parent_pid is not None and os.getppid() != parent_pid:
            os.kill(os.getpid(), signal.SIGKILL)


def quiet_vendors() -> None:
    """Hide the warnings of torch and megatron-core about each other, which every rank would repeat.

    They are about calls that megatron-core makes and packages it would like to find: nothing a user of a tool can act
    on. ``python -W default`` shows them.
    """
    if not sys.warnoptions:
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron)\.")


def _has_gpu() -> bool:
    """Whether the kernel shows an NVIDIA device; asking torch would initialise CUDA."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _run_world(fn: Callable[[Any], None], config: object, world_size: int, *, preload: Sequence[str]) -> int:
    context = multiprocessing.get_context("forkserver")
    # The fork server drops a name it cannot import; the rank that needs it then says so.
    context.set_forkserver_preload(["prism_megatron.engine.fork_server", *preload])
    ranks: list[ForkServerProcess] = []
    reports: list[Connection] = []
    with _environment(_fork_server_environment(world_size)), socket.create_server((_HOST, 0), backlog=512) as listener:
        # Handing rank 0 a socket that already listens leaves no moment in which another command could take the port.
        port = listener.getsockname()[1]
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(fn, config, _rank_environment(rank, world_size, port), sender),
                    kwargs={"listener": listener if rank == 0 else None},
                    name=f"rank {rank}",
                )
                process.start()
                sender.close()
                ranks.append(process)
                reports.append(receiver)
            listener.close()
            return _supervise(ranks, reports)
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            _end(ranks)


def _supervise(ranks: Sequence[ForkServerProcess], reports: Sequence[Connection]) -> int:
    """Wait for all ranks, or for the first that fails; what that one reports is all that is printed."""
    running = dict(enumerate(ranks))
    while running:
        wait(
            [
                *(process.sentinel for process in running.values()),
                *(reports[rank] for rank in running if not reports[rank].closed),
            ]
        )
        for rank, process in list(running.items()):
            if (report := _report(reports[rank])) is not None:
                status, text = report
                print(text, file=sys.stderr, flush=True)
                return status
            if process.exitcode is not None:
                del running[rank]
                if process.exitcode:
                    how = (
                        f"was ended by {signal.Signals(-process.exitcode).name}"
                        if process.exitcode < 0
                        else f"ended with status {process.exitcode}"
                    )
                    print(f"rank {rank} {how}", file=sys.stderr, flush=True)
                    return FAILURE
    return 0


def _report(connection: Connection) -> tuple[int, str] | None:
    """What a failing rank says, or None: a rank that ends well closes its end without a word."""
    if connection.closed or not connection.poll():
        return None
    try:
        status, text = connection.recv()
    except EOFError:
        connection.close()
        return None
    return int(status), str(text)


def _end(ranks: Sequence[ForkServerProcess]) -> None:
    """End every rank that still runs: SIGTERM, and SIGKILL for those that have not gone in time."""
    for process in ranks:
        if process.exitcode is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()


def _rank_main(
    fn: Callable[[Any], None],
    config: object,
    environment: Mapping[str, str],
    reports: Connection,
    *,
    listener: socket.socket | None,
) -> None:
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        return
    # Ctrl-C reaches the whole terminal group; the launcher answers it for all ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    try:
        store = None if listener is None else _serve_store(listener)
        fn(config)
        del store
        return
    except PrismError as error:
        reports.send((USER_ERROR, _one_line(error)))
    except Exception:  # noqa: BLE001  # whatever ended a rank is reported and ends the world
        reports.send((FAILURE, f"rank {environment['RANK']} failed\n{traceback.format_exc().rstrip()}"))
    # Ending now would close sockets under the other ranks, whose complaints would bury the cause.
    time.sleep(60.0)
    sys.exit(FAILURE)


def _serve_store(listener: socket.socket) -> object:
    """The key-value store that all ranks, this one included, meet through; it lives as long as the returned object."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # offered, but not in __all__

    port = listener.getsockname()[1]
    return TCPStore(_HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set. USE_AGENT_STORE: the store is served already, so rank 0 too joins it as a client."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _fork_server_environment(world_size: int) -> dict[str, str]:
    environment = {LAUNCHER_PID: str(os.getpid())}
    if world_size >= len(os.sched_getaffinity(0)):
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return environment


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for the fork server, which starts with the environment of this process."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _one_line(error: PrismError) -> str:
    return f"error: {' '.join(str(error).split())}"
