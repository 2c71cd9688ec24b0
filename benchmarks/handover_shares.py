"""What each rank gathers, sends and writes in a hand-over: all of it by rank 0, and by one sender a pipeline stage.

    make bench-handover-shares                       2B widths with 4 layers, TP2·PP2, two servers (8 GB of memory)

Bytes are counted where they are received, sent and written, in one run, first by ``Handover`` and then by
``SharedHandover``. Ranks are processes with gloo; the servers are the tests' fakes, which speak SGLang's protocol and
keep what they are given: after each hand-over they report the checksum of all of it, which must be the same on both.
The exit code is 1 where rank 0's part of any column is above half of what it was. Seconds are told and mean little:
ranks, servers and disk share two cores. Blind to GPUs and networks.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.weight_sync import LAYERS, NoSegments, cut_down
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.hf.reader import INDEX
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.weight_buckets import GATHERED_SHARE
from prism_megatron.rollout.weight_spool import spool_folder
from prism_megatron.sampling.handover import Handover, SharedHandover
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.testing import GlooWorld
from prism_megatron.training.roles import load_weights
from tests.handover_counts import Counts, counting
from tests.unit.rollout.fake_sglang import KEY, running
from tests.waiting import wait_for

LIMIT = 0.5
BUCKET_BYTES = 256 * 2**20
LAYOUT = ParallelConfig(tp=2, pp=2)
RANKS = 4
COLUMNS = ("gathered", "sent", "written")


def both_ways(world: World, folder: Path, urls: tuple[str, ...], spool: Path) -> list[tuple[Counts, float]]:
    """Counts and seconds of this rank, by the whole model and by shares."""
    shape = Qwen3VLShape.from_folder(folder)
    policy = MegatronEngine(name="policy", provider=Qwen3VLProvider(shape), world=world, dtype=torch.bfloat16,
                            optimizer=None, total_steps=1)  # fmt: skip
    load_weights(policy, folder)
    options = SGLangOptions(transport="group", bucket_bytes=BUCKET_BYTES)
    engine = SGLangRollout(folder, NoSegments(), urls=urls, api_key=KEY, end_token_ids=[0], spool=spool,
                           options=options)  # fmt: skip
    rollout, found = SharedRollout(engine, world), []
    for version, kind in enumerate((Handover, SharedHandover)):
        dist.barrier()
        with counting() as counts:
            began = time.perf_counter()
            kind(policy, rollout, BUCKET_BYTES // GATHERED_SHARE)(version, changed_only=False)
            seconds = time.perf_counter() - began
        wait_for((spool_folder(spool, version) / INDEX).exists, seconds=600.0)  # what is written aside counts too
        found.append((counts, seconds))
    dist.barrier()
    rollout.close()
    return found


def main() -> int:
    """Print the table; 1 where the limit is missed."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-handover-shares-")))
        folder = cut_down(work)
        fakes = [stack.enter_context(running(image_token_id=0, folder=folder)) for _ in range(2)]
        for fake in fakes:
            fake.num_layers = fake.num_blocks = LAYERS
        gloo = stack.enter_context(GlooWorld(RANKS, timeout_s=1200.0))
        found = gloo.run(both_ways, folder, tuple(fake.url for fake in fakes), work / "spool", parallel=LAYOUT)
        assert all(fake.version == "1" for fake in fakes)
    print(f"2B widths, {LAYERS} layers, bf16, TP2·PP2, two servers; MB of weights a rank")
    print("rank  " + "  ".join(f"{name:>10} alone  shared" for name in COLUMNS))
    for rank, ((alone, _), (shared, _)) in enumerate(found):
        cells = [f"{getattr(alone, name) / 1e6:16.0f}  {getattr(shared, name) / 1e6:6.0f}" for name in COLUMNS]
        print(f"{rank:>4}  " + "  ".join(cells))
    (alone, alone_seconds), (shared, shared_seconds) = found[0]
    ratios = {name: getattr(shared, name) / getattr(alone, name) for name in COLUMNS}
    print("rank 0, shared by alone: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
          + f" (limit {LIMIT:g}); {alone_seconds:.1f} s and {shared_seconds:.1f} s on the wall")  # fmt: skip
    return int(max(ratios.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
