"""Processes that read records for a rank, or for a tool that indexes them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext

PRELOAD = ("prism_megatron.data.prefetch",)


def worker_context() -> ForkServerContext:
    """How they are started: forked from a server without threads, and without what CUDA keeps of a process.

    A rank that was itself forked from a server has its workers forked from the same one, with all imports done there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def settle_worker(*_: object) -> None:
    """Make this process one that lives exactly as long as the one that started it, whoever signals the group.

    Whether to stop is the rank's affair, which needs its workers until it has. To be called first in every worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    # Not by the kernel's hand: the parent that it knows is the fork server.
    threading.Thread(target=follow, name="follows its parent", daemon=True).start()
