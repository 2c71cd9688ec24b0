"""From one command to a world of processes, and out of it again without leaving any behind.

A process that torchrun started as one of several is left alone. A single process that was asked for a larger
world starts the ranks itself: a fork server imports torch, megatron-core and transformers once (``PRELOAD``) and
the ranks are forked from it. Every process below the command dies with its parent, by the kernel's hand, so that
even a SIGKILL of the outer process leaves none.

Imports no torch: it runs in the tools before any rank exists.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

from prism_megatron.engine.supervision import FAILURE, Wishes, supervise
from prism_megatron.errors import ConfigError, LostRankError, PrismError, RunStopped
from prism_megatron.temporary import folder_for_sockets
from prism_megatron.terminal import tolerate

ConfigT = TypeVar("ConfigT")

USER_ERROR = PrismError.status
STOPPED = RunStopped.status
LAUNCHER_PID = "PRISM_LAUNCHER_PID"
"""Set for the fork server: the process it must not outlive."""

PRELOAD = (
    "prism_megatron.engine.eager_megatron",
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
"""Imported once, before the ranks are forked: seven seconds of CPU time that each rank would otherwise spend again.
The first optimizer step would import torch._dynamo. Nothing here may compute: a thread pool or a generator that a
module starts at import would be broken, or shared, in every rank."""

_TORCHRUN = "TORCHELASTIC_RUN_ID"
_HOSTS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
"""This host, as its ranks know it: the second where the first is not set up."""
_PR_SET_PDEATHSIG = 1
_to_launcher: Connection | None = None
"""In a rank that a launcher forked: where it listens."""


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
    environment this process is a rank already, and ``fn`` runs in it. ``preload`` names the modules that ranks find
    imported; where a GPU is present none are, because CUDA does not survive a fork.

    A PrismError on a rank is printed once, in one line, with its own status; any other exception ends the world with
    one traceback and status 1. SIGTERM and SIGINT are passed on to the ranks as SIGTERM, once; a second one ends all.
    Raises ConfigError for a number of processes that the layout cannot use.
    """
    die_with_torchrun()
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
            if not has_gpu():
                _import(preload)
            fn(config)
        except PrismError as error:
            return report_error(error)
        return 0
    print(f"{wanted} processes are needed and this is one: starting {wanted} on this host", flush=True)
    try:
        return _run_world(fn, config, wanted, preload=() if has_gpu() else (*preload, fn.__module__))
    except PrismError as error:  # of the launcher itself: ranks report their own
        return report_error(error)


def report_error(error: PrismError) -> int:
    """Print the error in one line, once for all ranks of a torchrun, and return the exit status for it.

    Ranks usually fail alike. Rank 0 speaks at once; the others give torchrun a second to end them first. A run that was
    asked to stop ends well for torchrun, which would report, and restart, ranks with any other status than 0.
    """
    rank = int(os.environ.get("RANK", "0"))
    speaker = error.speaker if isinstance(error, LostRankError) else 0 if isinstance(error, RunStopped) else None
    if speaker is not None:
        if rank == speaker:
            print(_one_line(error), file=sys.stderr, flush=True)
        return 0 if isinstance(error, RunStopped) and _TORCHRUN in os.environ else error.status
    if rank > 0:
        time.sleep(1.0)
    print(_one_line(error), file=sys.stderr, flush=True)
    return error.status


def advise(text: str) -> None:
    """What the launcher of this rank is to say if a rank is lost: how to go on. Without a launcher nobody hears it."""
    if _to_launcher is not None:
        _to_launcher.send((None, text))


def die_with_torchrun() -> None:
    """:func:`die_with_parent` where that is torchrun."""
    if _TORCHRUN in os.environ:
        die_with_parent()


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
        # That there is no CUDA runtime is said in the table of what does what.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron)\.")


def _import(names: Sequence[str]) -> None:
    """As the fork server does: what cannot be imported is left to whoever needs it, who then says so."""
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


def has_gpu() -> bool:
    """Whether the kernel shows an NVIDIA device; asking torch would initialise CUDA."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _run_world(fn: Callable[[Any], None], config: object, world_size: int, *, preload: Sequence[str]) -> int:
    context = multiprocessing.get_context("forkserver")
    folder = folder_for_sockets()
    # The fork server drops a name it cannot import; the rank that needs it then says so.
    context.set_forkserver_preload(["prism_megatron.engine.fork_server", *preload])
    ranks: list[ForkServerProcess] = []
    reports: list[Connection] = []
    wishes = Wishes(ranks, world_size)
    with (
        _environment(_fork_server_environment(world_size)),
        _sockets_in(folder),
        _listener() as listener,
    ):
        # Handing rank 0 a socket that already listens leaves no moment in which another command could take the port.
        host, port = listener.getsockname()[:2]
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(fn, config, _rank_environment(rank, world_size, host=host, port=port), sender),
                    kwargs={"listener": listener if rank == 0 else None},
                    name=f"rank {rank}",
                )
                process.start()
                sender.close()
                ranks.append(process)
                reports.append(receiver)
            listener.close()
            return wishes.status_of(supervise(ranks, reports, wishes))
        except KeyboardInterrupt:
            return wishes.status_of(FAILURE)
        finally:
            wishes.end()
            wishes.forget()


@contextmanager
def _sockets_in(folder: Path) -> Iterator[None]:
    """Have multiprocessing make its folder, for this process's owner alone and removed at its end, in ``folder``."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def loopback_variables() -> dict[str, str]:
    """What gloo is told on a host without 127.0.0.1, which it would take for ranks of one host: which device to use."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    family, host = _HOSTS[0]
    try:
        socket.create_server((host, 0), family=family).close()
    except OSError:
        return {"GLOO_SOCKET_IFNAME": "lo"}
    return {}


def _listener() -> socket.socket:
    """A socket of this host that listens on a free port. Raises ConfigError where it has no address of its own."""
    complaints = []
    for family, host in _HOSTS:
        try:
            return socket.create_server((host, 0), family=family, backlog=512)
        except OSError as error:
            complaints.append(f"{host}: {error.strerror or error}")
    raise ConfigError(f"ranks of this host cannot meet ({'; '.join(complaints)}); set up its loopback device (lo)")


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tolerate()
    global _to_launcher  # noqa: PLW0603  # a process has one launcher
    _to_launcher = reports
    os.environ.update(environment)
    try:
        store = None if listener is None else _serve_store(listener)
        fn(config)
        del store
        return
    except PrismError as error:
        reports.send((error.status, _one_line(error)))
    except Exception:  # noqa: BLE001  # whatever ended a rank is reported and ends the world
        reports.send((FAILURE, f"rank {environment['RANK']} failed\n{traceback.format_exc().rstrip()}"))
    # Ending now would close sockets under the other ranks, whose complaints would bury the cause.
    time.sleep(60.0)
    sys.exit(FAILURE)


def _serve_store(listener: socket.socket) -> object:
    """The key-value store that all ranks, this one included, meet through; it lives as long as the returned object."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # offered, but not in __all__

    host, port = listener.getsockname()[:2]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _rank_environment(rank: int, world_size: int, *, host: str, port: int) -> dict[str, str]:
    """What torchrun would set. USE_AGENT_STORE: the store is served already, so rank 0 too joins it as a client."""
    return loopback_variables() | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": host,
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
    kind = "" if isinstance(error, RunStopped) else "error: "
    return f"{kind}{' '.join(str(error).split())}"
