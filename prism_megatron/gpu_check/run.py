"""All checks, each in a process of its own: one that dies, or hangs, takes none of the others with it."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection, wait

import torch

from prism_megatron.config.tools.gpu_check import CHECKS, Check, GpuCheckConfig
from prism_megatron.disk import write_atomically, writing
from prism_megatron.engine.launch import die_with_parent, quiet_vendors
from prism_megatron.gpu_check.rows import Row, document, failed, lines, skipped

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "flash-attn", "apex", "sglang")


def run_checks(config: GpuCheckConfig) -> bool:
    """Make the checks, print the table and write it; whether nothing failed.

    Raises DiskError where ``config.output`` cannot be written.
    """
    if config.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with writing(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
    machine = facts(dry=config.dry)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    deadline = time.monotonic() + 60 * config.minutes
    found: dict[str, list[Row]] = {}
    for check in (one for one in CHECKS if one in config.only):
        found[check] = list(rows_of(check, config, deadline=deadline))
        print("\n".join(lines({check: found[check]})), flush=True)
        write_atomically(config.output / "gpu_check.json", document(machine, found))
        write_atomically(config.output / "table.txt", "\n".join(lines(found)) + "\n")
    counts = {verdict: sum(row.verdict == verdict for rows in found.values() for row in rows)
              for verdict in ("holds", "FAILS", "measured", "skipped")}  # fmt: skip
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), flush=True)
    return not counts["FAILS"]


def facts(*, dry: bool) -> Mapping[str, object]:
    """What the figures are of."""
    found: dict[str, object] = {"python": platform.python_version()}
    found |= {name: installed for name in _PACKAGES if (installed := _version(name)) is not None}
    if dry:
        return {"device": "the CPU: --dry", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "CUDA": str(torch.version.cuda),
        **found,
    }


def rows_of(check: Check, config: GpuCheckConfig, *, deadline: float) -> Iterator[Row]:
    """What a check finds, as it finds it, until ``deadline`` (of ``time.monotonic``)."""
    if time.monotonic() >= deadline:
        yield skipped("all of it", f"the {config.minutes:g} minutes were over")
        return
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(check, config, sending, os.getpid()), name=check)
    child.start()
    sending.close()
    try:
        while True:
            if not wait([receiving], timeout=max(0.0, deadline - time.monotonic())):
                yield failed("the rest of it", f"it was not over after {config.minutes:g} minutes; raise --minutes")
                return
            try:
                row: Row | None = receiving.recv()
            except EOFError:
                child.join()
                yield failed("the rest of it", _ending(child.exitcode))
                return
            if row is None:
                return
            yield row
    finally:
        child.kill()
        with suppress(ProcessLookupError):  # of one that was ended before it had a group
            os.killpg(child.pid or 0, signal.SIGKILL)  # and what it started
        child.join()


def _child(check: Check, config: GpuCheckConfig, sending: Connection, parent: int) -> None:
    """A check's process, the first of a group of its own: its rows, and None when it is through."""
    os.setsid()
    die_with_parent(parent)
    for row in _made(check, config):
        sending.send(row)
    sending.send(None)


def _made(check: Check, config: GpuCheckConfig) -> Iterator[Row]:
    if check == "align":
        from prism_megatron.gpu_check.align import check_align

        return check_align(config.output / "align")
    quiet_vendors()
    from prism_megatron.gpu_check.on_device import on_device

    return on_device(check, dry=config.dry)


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}; what it said is above"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
