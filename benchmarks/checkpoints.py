"""What a checkpoint costs a run: the same steps without saves, with saves at once, and with saves beside them.

    python benchmarks/checkpoints.py [--ranks 2] [--steps 9] [--save-every 3] [--folder FOLDER]

A random dense Qwen3-VL trains in bf16 with fp32 masters on data-parallel ranks over gloo, on the CPU. One process a
rank does all three ways, one after the other, from the same weights. It prints seconds from one step to the next, of
those with a save and of the others, of the whole, what each rank wrote, and whether folders and losses are the same.
Blind spot: copies from a device; here device and host are one memory.
"""

from __future__ import annotations

import argparse
import filecmp
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from prism_megatron.engine.engine import MegatronEngine
    from prism_megatron.engine.runtime import World

VOCAB, WAYS = 8192, ("no saves", "at once", "aside")
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_vl", "tie_word_embeddings": True, "dtype": "bfloat16", "image_token_id": 8190,
    "video_token_id": 8191, "vision_start_token_id": 8188, "vision_end_token_id": 8189,
    "text_config": {
        "num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [16, 8, 8]},
        "hidden_act": "silu", "attention_bias": False, "eos_token_id": 1, "pad_token_id": 0,
    },
    "vision_config": {
        "depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 512, "patch_size": 16,
        "temporal_patch_size": 2, "in_channels": 3, "spatial_merge_size": 2, "out_hidden_size": 512,
        "num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": [1, 2],
    },
}  # fmt: skip


@dataclass
class Measured:
    """What one way of saving came to on one rank."""

    plain: list[float] = field(default_factory=list)
    """seconds of steps after which nothing was saved"""
    saving: list[float] = field(default_factory=list)
    """seconds of steps with a save, up to the next step"""
    until_there: list[float] = field(default_factory=list)
    """seconds from the beginning of a save until the checkpoint is there"""
    total: float = 0.0
    """seconds of all steps, and of the wait for the last checkpoint"""
    losses: list[float] = field(default_factory=list)
    written: int = 0
    """bytes that this rank writes of a checkpoint"""


def built(world: World, steps: int) -> MegatronEngine:
    """The policy, from weights that are drawn from their names."""
    import torch

    from model_providers.qwen3_vl.provider import Qwen3VLProvider
    from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
    from prism_megatron.config.engine.optimizer import OptimizerConfig
    from prism_megatron.conversion.mapping import TensorSource
    from prism_megatron.engine.engine import MegatronEngine

    class Random(TensorSource):
        def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
            self._shapes = shapes

        def names(self) -> Sequence[str]:
            return list(self._shapes)

        def shapes(self) -> dict[str, tuple[int, ...]]:
            return self._shapes

        def dtypes(self) -> dict[str, torch.dtype]:
            return dict.fromkeys(self._shapes, torch.float32)

        def get(self, name: str) -> torch.Tensor:
            noise = torch.randn(self._shapes[name], generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            return 1.0 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.04 * noise

    provider = Qwen3VLProvider(Qwen3VLShape.from_dict(CONFIG))
    engine = MegatronEngine(name="policy", provider=provider, world=world, dtype=torch.bfloat16,
                            optimizer=OptimizerConfig(lr=1e-4), total_steps=steps)  # fmt: skip
    mappings = provider.weight_mappings()
    engine.load_hf(Random({name: of for one in mappings
                           for name, of in zip(one.hf_names, one.hf_shapes or (), strict=True)}))  # fmt: skip
    return engine


def measured(world: World, root: Path, way: str, steps: int, save_every: int) -> Measured:
    """Steps of two rows of 64 tokens a rank."""
    from prism_megatron.conversion.checkpoints.folder import step_folder
    from prism_megatron.engine import checkpoint
    from prism_megatron.engine.saving import Saving
    from prism_megatron.training.batches import BatchFormat, supervised_batch
    from prism_megatron.training.supervised_update import learn
    from prism_megatron.types import TokenSequence

    engine, found = built(world, steps), Measured()
    form = BatchFormat(pad_token_id=0, end_token_id=1, length_multiple=1, device=world.device)
    found.written = sum(piece.tensor.nbytes for piece in engine.pieces() if piece.is_written)
    under_way: tuple[Saving, float] | None = None
    began = last = time.perf_counter()

    def settle() -> None:
        nonlocal under_way
        if under_way is not None:
            under_way[0].finish()
            found.until_there.append(time.perf_counter() - under_way[1])
            under_way = None

    for step in range(1, steps + 1):
        rows = [TokenSequence(tuple(2 + (7 * row + 13 * word + step + 31 * world.rank) % 8000 for word in range(64)))
                for row in range(2)]  # fmt: skip
        masks = [[0.0] + [1.0] * 63 for _ in rows]
        found.losses.append(learn(engine, [supervised_batch(rows, masks, form=form, pack=True)], world=world).loss)
        if under_way is not None and under_way[0].is_written():
            settle()
        is_saved = way != "no saves" and step % save_every == 0
        if is_saved:
            settle()
            folder, start = step_folder(root / way, step), time.perf_counter()
            under_way = checkpoint.begin(folder, {"policy": engine}, {}, models={}, aside=way == "aside"), start
            if way == "at once":
                settle()
        now = time.perf_counter()
        (found.saving if is_saved else found.plain).append(now - last)
        last = now
    settle()
    found.total = time.perf_counter() - began
    return found


def main() -> int:
    """Returns the exit status: 1 where the ways differ in what they learn or in what they write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    asked = parser.parse_args()

    from prism_megatron.testing import GlooWorld

    with tempfile.TemporaryDirectory(dir=asked.folder) as name, GlooWorld(asked.ranks, timeout_s=1800.0) as gloo:
        root = Path(name)
        found = {way: gloo.run(measured, root, way, asked.steps, asked.save_every) for way in WAYS}
        files, others = (
            sorted(str(path.relative_to(root / way)) for path in (root / way).rglob("*") if path.is_file())
            for way in ("aside", "at once")
        )
        equal, _, _ = filecmp.cmpfiles(root / "at once", root / "aside", files, shallow=False)
    unequal = not files == others == equal
    first = found["no saves"][0]
    share = ", ".join(f"{one.written / 1e6:.0f}" for one in found["aside"])
    print(f"DP{asked.ranks}, {asked.steps} steps, a save every {asked.save_every}; MB of a checkpoint by rank: {share}")
    print(f"  {'':10} {'s a step':>9} {'with a save':>12} {'until it is there':>18} {'s in all':>9}   last loss")
    for way in WAYS:
        one = found[way][0]
        saving, there = (f"{statistics.median(x):.2f}" if x else "-" for x in (one.saving, one.until_there))
        print(f"  {way:10} {statistics.median(one.plain):9.2f} {saving:>12} {there:>18} {one.total:9.1f}   "
              f"{one.losses[-1]:.6f}")  # fmt: skip
    print("checkpoints at once and aside are " + ("NOT the same" if unequal else f"the same in {len(files)} files"))
    return int(unequal or any(found[way][0].losses != first.losses for way in WAYS))


if __name__ == "__main__":
    sys.exit(main())
