"""A throwaway tool for test_launch.py: every rank joins a gloo world, adds up the ranks, and does as it was told."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.engine.launch import PRELOAD, launch
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class Order:
    """``action``: add, hang, config-error, crash (on the last rank), die (on the last rank, without a word), linger
    (config-error on the first rank, and none hears SIGTERM)."""

    action: str
    folder: Path
    started: float


def run(order: Order) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    line = {"rank": rank, "pid": os.getpid(), "sum": total.item(), "seconds": time.time() - order.started}
    (order.folder / f"rank{rank}.tmp").write_text(json.dumps(line), encoding="utf-8")
    (order.folder / f"rank{rank}.tmp").replace(order.folder / f"rank{rank}.json")
    dist.barrier()
    if order.action == "linger":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()  # then all are deaf
        if rank:
            threading.Event().wait()  # until it is ended
        raise ConfigError("all is over")
    if order.action == "config-error":
        raise ConfigError("--tp 3 must divide\nthe model's 4 KV heads")
    if order.action == "hang":
        threading.Event().wait()  # until it is ended
    if order.action == "crash" and rank == dist.get_world_size() - 1:
        raise ValueError("the last rank trips")
    if order.action == "die" and rank == dist.get_world_size() - 1:
        os._exit(7)
    if order.action in ("crash", "die"):
        threading.Event().wait()  # until it is ended, because another rank was
    dist.destroy_process_group()


def main() -> int:
    # A shell's background jobs, and what they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    action, folder, size, preload = sys.argv[1:]
    return launch(
        run,
        Order(action, Path(folder), time.time()),
        model_parallel_size=int(size),
        preload=PRELOAD if preload == "all" else ("torch",),
    )


if __name__ == "__main__":
    sys.exit(main())
