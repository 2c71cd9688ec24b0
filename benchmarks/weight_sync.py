"""What handing a policy's weights over costs: seconds and bytes of each way, beside a plain copy of the same bytes.

    make bench-weight-sync                                   the mini, and 2B widths with 4 layers (3 GB of memory)
    python benchmarks/weight_sync.py --models mini --paths embedded

Two tables for each model, one process and one thread. ``gather`` iterates the engine's export in pieces and drops
them; ``copy`` clones every parameter; CPU seconds of the process, the two in turn, the fastest counts. ``hand-over``
rows time a whole update on the wall: to a real SGLang server (skipped where ``make sglang`` has not been run), and to
the embedded replica. ``peak`` is how far the resident memory of this process rises above where it stood (Linux's
VmHWM, reset before each), in buckets; a tensor larger than a bucket counts as one. The exit code is 1 where the 2B
model's ``gather`` takes more than twice ``copy``, or its peak is above two buckets; the mini is so small
that its figures are those of Python and of the allocator. Blind to GPUs, networks and several trainer processes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.presets import hf_config, preset
from prism_megatron.config.tools.convert import MakeRandomConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import start, stop
from prism_megatron.jobs.random_model import make_random
from prism_megatron.observability.transfer import format_bytes
from prism_megatron.rollout.replica import build_replica, copy_weights
from prism_megatron.rollout.sglang.arguments import PYTHON, ServerOptions
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.server import SGLangServers
from prism_megatron.rollout.sglang.weights import Transport
from prism_megatron.rollout.weight_buckets import GATHERED_SHARE, pieces
from prism_megatron.training.roles import load_weights
from prism_megatron.types import Segments

ROOT = Path(__file__).resolve().parent.parent
GATHER_LIMIT = 2.0
PEAK_LIMIT = 2.0
LAYERS = 4


@dataclass(frozen=True)
class Model:
    """A policy in an engine, the folder it came from, and what it weighs."""

    name: str
    folder: Path
    engine: MegatronEngine
    bucket_bytes: int

    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [tensor.nbytes for _, tensor in self.engine.export_hf(self.bucket_bytes // GATHERED_SHARE)]


class NoSegments:
    """Nothing is sampled here."""

    def find(self, token_ids: Sequence[int]) -> Segments:
        return Segments(None, None, f"{len(token_ids)} tokens, not judged")

    def watch(self) -> NoSegments:
        return self

    def add(self, token_id: int) -> bool:
        del token_id
        return False


def cut_down(folder: Path) -> Path:
    """The published 2B model with random weights and 4 layers in each tower, beside the mini's tokenizer."""
    config = hf_config(preset("2B"))
    config["text_config"]["num_hidden_layers"] = LAYERS
    config["vision_config"] |= {"depth": LAYERS, "deepstack_visual_indexes": [0, 1, 2]}
    tokens = json.loads((MINI_FOLDER / "policy" / "config.json").read_text(encoding="utf-8"))
    config |= {key: value for key, value in tokens.items() if key.endswith("_token_id")}
    source = folder / "config.json"
    source.write_text(json.dumps(config), encoding="utf-8")
    made = folder / "model"
    make_random(MakeRandomConfig(config=str(source), save=str(made), dtype="bf16"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
        shutil.copyfile(MINI_FOLDER / "policy" / name, made / name)
    return made


def fastest(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """CPU seconds of the fastest of ``repeats`` calls of each, in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            began = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - began)
    return best


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_of(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds on the wall, and bytes by which the resident memory rose at most."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    before, began = status_bytes("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - began, status_bytes("VmHWM") - before


def gather_beside_copy(model: Model, repeats: int) -> bool:
    """Print the first table; whether the limit is held."""
    parameters = [p for module in model.engine.modules for p in module.parameters()]

    def gather() -> None:
        weights = model.engine.export_hf(model.bucket_bytes // GATHERED_SHARE)
        deque(pieces(weights, model.bucket_bytes, count=len(weights.shapes)), maxlen=0)

    def copy() -> None:
        for parameter in parameters:
            parameter.detach().clone()

    gathered, copied = fastest((gather, copy), repeats)
    counts = model.name != "mini"
    print(
        f"  gather {gathered:.4f} s, copy {copied:.4f} s: ratio {gathered / copied:.2f}"
        + (f" (limit {GATHER_LIMIT:g})" if counts else "")
    )
    return not counts or gathered <= GATHER_LIMIT * copied


def embedded(model: Model, repeats: int, _work: Path) -> tuple[float, int]:
    """Fastest update of the embedded engine's replica, and the largest peak."""
    replica = build_replica(model.folder, device=torch.device("cpu"), dtype=model.engine.dtype)

    def update() -> None:
        copy_weights(replica, model.engine.export_hf(model.bucket_bytes // GATHERED_SHARE))

    return summary([peak_of(update) for _ in range(repeats + 1)])


def served(transport: Transport, model: Model, repeats: int, work: Path) -> tuple[float, int]:
    """Fastest update of a real server by ``transport``, and the largest peak of this process."""
    options = ServerOptions(
        model=model.folder,
        logs=work / f"{model.name}-{transport}",
        python=ROOT / PYTHON,
        dtype=str(model.engine.dtype).removeprefix("torch."),
        context_length=512,
        max_total_tokens=2048,
        max_running_requests=4,
        start_seconds=900.0,
    )
    servers = SGLangServers(options, count=1)
    servers.start()
    rollout = SGLangRollout(
        model.folder,
        NoSegments(),
        urls=servers.urls,
        api_key=servers.api_key,
        end_token_ids=[0],
        spool=options.logs,
        servers=servers,
        options=SGLangOptions(transport=transport, bucket_bytes=model.bucket_bytes),
    )
    try:
        updates = [
            peak_of(partial(rollout.update_weights, model.engine.export_hf(model.bucket_bytes // GATHERED_SHARE), i))
            for i in range(repeats + 1)
        ]
    finally:
        rollout.close()
    return summary(updates)


def summary(updates: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Fastest and largest after the first, which also sets things up."""
    return min(seconds for seconds, _ in updates[1:]), max(peak for _, peak in updates[1:])


WAYS: dict[str, Callable[[Model, int, Path], tuple[float, int]]] = {
    "embedded": embedded,
    "disk": partial(served, "disk"),
    "tensor": partial(served, "tensor"),
    "group": partial(served, "group"),
}


def hand_overs(model: Model, paths: Sequence[str], *, repeats: int, work: Path) -> bool:
    """Print the second table; whether every peak that counts is within its limit."""
    sizes = model.sizes()
    bucket = max(model.bucket_bytes, *sizes)
    held = True
    for name in paths:
        if name != "embedded" and not (ROOT / PYTHON).exists():
            print(f"  {name:>8}: not run, `make sglang` has not been")
            continue
        seconds, peak = WAYS[name](model, repeats, work)
        counts = model.name != "mini"
        held = held and (not counts or peak <= PEAK_LIMIT * bucket)
        print(
            f"  {name:>8}: {seconds:7.3f} s for {format_bytes(sum(sizes))}, peak {format_bytes(peak)} = "
            f"{peak / bucket:.2f} buckets" + (f" (limit {PEAK_LIMIT:g})" if counts else ""),
            flush=True,
        )
    return held


def main() -> int:
    """Measure; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("mini", "2B"), default=["mini", "2B"])
    parser.add_argument("--paths", nargs="*", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--bucket-mib", type=int, default=256, help="of the 2B model; the mini's is one MiB")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = start(ParallelConfig(), seed=0)
    print(f"one process, one thread, torch {torch.__version__}")
    held = True
    with tempfile.TemporaryDirectory(prefix="bench-weight-sync-") as name:
        work = Path(name)
        for kind in args.models:
            folder = MINI_FOLDER / "policy" if kind == "mini" else cut_down(work)
            shape = Qwen3VLShape.from_folder(folder)
            engine = MegatronEngine(
                name="policy",
                provider=Qwen3VLProvider(shape),
                world=world,
                dtype=torch.float32 if kind == "mini" else torch.bfloat16,
                optimizer=None,
                total_steps=1,
            )
            load_weights(engine, folder)
            model = Model(kind, folder, engine, (1 if kind == "mini" else args.bucket_mib) * 2**20)
            largest = format_bytes(max(model.sizes()))
            print(f"\n{kind}, buckets of {format_bytes(model.bucket_bytes)}, largest tensor {largest}")
            held = gather_beside_copy(model, args.repeats) and held
            held = hand_overs(model, args.paths, repeats=args.repeats, work=work) and held
    stop(world)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
