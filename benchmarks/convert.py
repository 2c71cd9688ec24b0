"""What converting a model of real size costs beside copying it: time, memory, and the same bits at the end.

    make bench-convert                                       the 4B model: 8.9 GB, about 45 GB of disk
    python benchmarks/convert.py --config 2B --kills 5       another size; killed and resumed too
    python benchmarks/convert.py --memory-limit-gb 3         every conversion under a memory limit

One run writes a random model, copies it (``cp -r`` and a sync), converts it to a checkpoint and back, and compares
every tensor. Before each leg the pages of the files it reads are dropped from the page cache (fsync, then
``posix_fadvise(DONTNEED)`` on each), so every leg reads from the disk, or from what the host of a virtual disk keeps.
Every leg ends when its files are flushed to disk. Memory is the anonymous resident memory of the converter's processes
(RssAnon, summed over the process tree, sampled every 50 ms); Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch

from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.observability.transfer import format_bytes

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
BLOCK_BYTES = 64 * 2**20
TIME_LIMIT = 2.5
"""Most that a direction may take, as a multiple of cp."""
MEMORY_LIMIT_GIB = 1.5
CGROUPS = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Leg:
    """What one command took."""

    seconds: float
    peak_bytes: int
    status: int


def drop_pages(folder: Path) -> None:
    """Forget the cached pages of every file in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process and all below it, from Linux's account of them."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return total


def run(command: Sequence[str], *, limit: Path | None = None, kill_at: float | None = None) -> Leg:
    """Run a command, sampling its memory, under the cgroup ``limit``; SIGKILL once it has written ``kill_at`` bytes."""
    prefix = [] if limit is None else ["sh", "-c", f'echo $$ > {limit / "cgroup.procs"}; exec "$@"', "sh"]
    begin = time.monotonic()
    with subprocess.Popen([*prefix, *command]) as child:
        process, peak = psutil.Process(child.pid), 0
        while child.poll() is None:
            try:
                peak = max(peak, anonymous_bytes(process))
                if kill_at is not None and process.io_counters().write_chars >= kill_at:
                    child.send_signal(signal.SIGKILL)
                    break
            except psutil.NoSuchProcess:
                break
            time.sleep(0.05)
        status = child.wait()
    return Leg(time.monotonic() - begin, peak, status)


def convert(command: str, source: Path, target: Path, arguments: Sequence[str] = ()) -> list[str]:
    """A command line of tools/convert.py."""
    flag = {"to-megatron": "--hf", "to-hf": "--load"}[command]
    tool = str(ROOT / "tools" / "convert.py")
    return [sys.executable, tool, command, flag, str(source), "--save", str(target), *arguments]


def memory_cgroup(num_bytes: int) -> Path:
    """A new cgroup below this process's own that holds so much memory, page cache included."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = {path.lstrip("/"): names for _, names, path in lines}
    version_1 = next((path for path, names in places.items() if "memory" in names.split(",")), None)
    if version_1 is None:
        folder = CGROUPS / next(path for path, names in places.items() if not names)
        file = "memory.max"
    else:
        folder, file = CGROUPS / "memory" / version_1, "memory.limit_in_bytes"
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=folder))
    (folder / file).write_text(str(num_bytes))
    return folder


def unequal(first: Path, second: Path) -> list[str]:
    """Names of the tensors that differ in shape, number format or a bit, compared block by block."""
    one, other = HFFolder(first), HFFolder(second)
    if list(one.names()) != list(other.names()) or one.shapes() != other.shapes() or one.dtypes() != other.dtypes():
        return ["names, shapes or formats"]
    shapes, dtypes, found = one.shapes(), one.dtypes(), []
    for name in one.names():
        row_bytes = torch.Size(shapes[name][1:]).numel() * dtypes[name].itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, shapes[name][0], step):
            stop = min(shapes[name][0], start + step)
            raw = [source.get_rows(name, start, stop).reshape(-1).view(torch.uint8) for source in (one, other)]
            if not torch.equal(*raw):
                found.append(name)
                break
    return found


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def kill_and_resume(command: str, source: Path, target: Path, flags: Sequence[str], *, size: int, kills: int) -> bool:
    """Whether a conversion that is killed at random moments, then left alone, ends in the bytes that ``target`` has."""
    expected = digest(target)
    again = target.with_name(f"{target.name}-again")
    done = 0
    while done < kills:
        kill_at = random.uniform(0.0, size / kills)
        leg = run(convert(command, source, again, flags), kill_at=kill_at)
        if leg.status != -signal.SIGKILL:
            shutil.rmtree(again)  # it was done before the kill; begin anew, so that every kill counts
            continue
        done += 1
        print(f"  {command}: killed at {format_bytes(kill_at)} written", flush=True)
    # Replacing is allowed: a kill may come after the rename that finished the folder.
    status = run(convert(command, source, again, [*flags, "--overwrite"])).status
    same = status == 0 and digest(again) == expected
    shutil.rmtree(again, ignore_errors=True)
    return same


def measure(args: argparse.Namespace, work: Path, limit: Path | None) -> bool:
    """All legs in turn; prints the table and returns whether everything is equal and within its limits."""
    model, copied, checkpoint, back = (work / name for name in ("model", "copy", "megatron", "back"))
    make = [sys.executable, str(ROOT / "tools" / "make_random.py"), "--config", args.config, "--save", str(model)]
    subprocess.run(make, check=True)
    size = sum(path.stat().st_size for path in model.iterdir())
    drop_pages(model)
    legs = {"cp -r, sync": run(["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", str(model), str(copied)])}
    shutil.rmtree(copied)
    workers = ["--workers", str(args.workers)]
    flags = {"to-megatron": ["--tp", str(args.tp), "--pp", str(args.pp), *workers, "--weights-only"], "to-hf": workers}
    for command, source, target in (("to-megatron", model, checkpoint), ("to-hf", checkpoint, back)):
        drop_pages(source)
        legs[command] = run(convert(command, source, target, flags[command]), limit=limit)
        if legs[command].status:
            print(f"{command} ended with status {legs[command].status}")
            return False
    different = unequal(model, back)
    copy = legs["cp -r, sync"].seconds
    print(
        f"\n{args.config}, {format_bytes(size)}, TP{args.tp} PP{args.pp}, {args.workers} workers, "
        f"torch {torch.__version__}"
    )
    print(f"{'leg':<14}{'seconds':>9}{'x cp':>7}{'MB/s':>7}{'peak anonymous':>17}")
    for name, leg in legs.items():
        rate = size / leg.seconds / 1e6
        peak = leg.peak_bytes / GIB
        print(f"{name:<14}{leg.seconds:>9.1f}{leg.seconds / copy:>7.2f}{rate:>7.0f}{peak:>13.2f} GiB")
    print(f"tensors that differ after both ways: {len(different)} {different[:3] or ''}")
    good = not different and all(
        leg.seconds <= TIME_LIMIT * copy and leg.peak_bytes <= MEMORY_LIMIT_GIB * GIB for leg in legs.values()
    )
    if args.kills:
        for command, source, target in (("to-megatron", model, checkpoint), ("to-hf", checkpoint, back)):
            same = kill_and_resume(command, source, target, flags[command], size=size, kills=args.kills)
            print(f"{command}: killed {args.kills} times and resumed, same bytes: {'yes' if same else 'NO'}")
            good = good and same
    print(
        f"limits ({TIME_LIMIT} x cp, {MEMORY_LIMIT_GIB} GiB anonymous) and equality: {'held' if good else 'NOT HELD'}"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="4B", help="a published size or a config.json")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where the folders are written, and removed")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=0, help="kill each direction so many times, and resume")
    parser.add_argument("--memory-limit-gb", type=float, help="GiB for each conversion, page cache included (a cgroup)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    random.seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=args.work))
    limit = None
    try:
        if args.memory_limit_gb is not None:
            try:
                limit = memory_cgroup(int(args.memory_limit_gb * GIB))
            except OSError as error:
                print(f"no memory cgroup can be made here ({error}); run without --memory-limit-gb")
                return 1
            print(f"conversions run in the memory cgroup {limit} of {args.memory_limit_gb} GiB")
        return 0 if measure(args, work, limit) else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if limit is not None:
            limit.rmdir()


if __name__ == "__main__":
    sys.exit(main())
