"""What ``--cache-vision`` saves: a step of fine-tuning with a frozen vision tower, its features computed or from disk.

    python benchmarks/vision_cache.py                         made pictures, sized as photographs are
    python benchmarks/vision_cache.py --photographs FOLDER    real ones (jpg, png), with --steps 4

One run trains the same steps three times, each in a process of its own: without a cache, while the folder is filled,
and with everything found. It prints seconds a step (the median), what the process held at most beyond its start, and
the losses, which have to be equal. Pictures are preprocessed before the clock starts: a cache does not spare that.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import resource
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TOLERANCE = 1e-5
"""Between losses: features are the same numbers, but sums over images that were encoded together are cut otherwise."""
PIXELS = 640 * 480
VOCAB, IMAGE, START, END = 8192, 8190, 8188, 8189


def model_config(width: int, depth: int) -> dict[str, Any]:
    """A Qwen3-VL of published proportions: patches of 16, merged by two, DeepStack taps."""
    heads = width // 64
    return {
        "model_type": "qwen3_vl", "tie_word_embeddings": True, "dtype": "float32", "image_token_id": IMAGE,
        "video_token_id": 8191, "vision_start_token_id": START, "vision_end_token_id": END,
        "text_config": {
            "num_hidden_layers": depth, "hidden_size": width, "intermediate_size": 3 * width,
            "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2), "head_dim": 64,
            "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "hidden_act": "silu", "attention_bias": False,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [16, 8, 8]},
            "eos_token_id": 1, "pad_token_id": 0,
        },
        "vision_config": {
            "depth": depth, "hidden_size": width, "num_heads": heads, "intermediate_size": 4 * width, "patch_size": 16,
            "temporal_patch_size": 2, "in_channels": 3, "spatial_merge_size": 2, "out_hidden_size": width,
            "num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": [1, 2],
        },
    }  # fmt: skip


MODELS = {"tiny": model_config(128, 4), "31M": model_config(384, 6)}


@dataclass(frozen=True)
class Measured:
    """What one way of training came to."""

    seconds: float
    growth_mb: float
    losses: list[float]
    images: int
    found: int
    parameters: int


def train(model: str, photographs: Path | None, steps: int, rows: int, cache: Path | None) -> Measured:
    """Steps of one image and 60 words to a row; every image is shown once."""
    import torch

    from model_providers.qwen3_vl.provider import Qwen3VLProvider
    from prism_megatron.config.architecture.model import ALL_VISION
    from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
    from prism_megatron.config.engine.optimizer import OptimizerConfig
    from prism_megatron.config.engine.parallel import ParallelConfig
    from prism_megatron.config.engine.vision_cache import VisionCacheConfig
    from prism_megatron.conversion.mapping import TensorSource
    from prism_megatron.engine.engine import MegatronEngine
    from prism_megatron.engine.runtime import start
    from prism_megatron.training.batches import BatchFormat, supervised_batch
    from prism_megatron.training.frozen_vision import use_vision_cache
    from prism_megatron.training.supervised_update import learn
    from prism_megatron.types import TokenSequence

    class Random(TensorSource):
        """Tensors drawn from their names."""

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

    world = start(ParallelConfig(), seed=1)
    provider = Qwen3VLProvider(Qwen3VLShape.from_dict(MODELS[model]), freeze=ALL_VISION)
    policy = MegatronEngine(name="policy", provider=provider, world=world, dtype=torch.float32,
                            optimizer=OptimizerConfig(lr=1e-4), total_steps=steps)  # fmt: skip
    mappings = provider.weight_mappings()
    shapes = {name: of for one in mappings for name, of in zip(one.hf_names, one.hf_shapes or (), strict=True)}
    policy.load_hf(Random(shapes))
    use_vision_cache(policy, VisionCacheConfig(cache))
    form = BatchFormat(pad_token_id=0, end_token_id=1, length_multiple=1, device=world.device)
    images = pictures(photographs, steps * rows)
    before, seconds, losses = peak_mb(), [], []
    for step in range(steps):
        made = []
        for number, image in enumerate(images[step * rows : (step + 1) * rows]):
            pads = image.grid_thw[1] * image.grid_thw[2] // 4
            words = [2 + (7 * number + 13 * word + step) % 8000 for word in range(60)]
            made.append(TokenSequence((START, *[IMAGE] * pads, END, *words), (image,)))
        masks = [[0.0] * (len(one.token_ids) - 60) + [1.0] * 60 for one in made]
        began = time.perf_counter()
        losses.append(learn(policy, [supervised_batch(made, masks, form=form, pack=True)], world=world).loss)
        seconds.append(time.perf_counter() - began)
    counts = None if policy.vision_cache is None else policy.vision_cache.take_counts()
    parameters = sum(parameter.numel() for parameter in policy.modules[0].parameters())
    return Measured(statistics.median(seconds), peak_mb() - before, losses, len(images),
                    0 if counts is None else counts.found, parameters)  # fmt: skip


def pictures(folder: Path | None, count: int) -> list[Any]:
    """Preprocessed pictures of at most ``PIXELS``; made ones are noise over a slope, so that no two are alike."""
    import numpy as np
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from prism_megatron.data.pictures.files import open_image
    from prism_megatron.data.pictures.images import ImagePreprocessor

    processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, temporal_patch_size=2,
                                         size={"shortest_edge": 4096, "longest_edge": PIXELS})  # fmt: skip
    preprocess = ImagePreprocessor(processor)
    if folder is not None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})[:count]
        return [preprocess(open_image(path)) for path in paths]
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        slope = np.linspace(0, 255, 640)[None, :, None] * rng.random(3) + rng.normal(0, 20, (480, 640, 3))
        found.append(preprocess(Image.fromarray(slope.clip(0, 255).astype(np.uint8))))
    return found


def peak_mb() -> float:
    """The most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> int:
    """Returns the exit status: 1 where losses differ, or a folder that is full is not used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="images of a step")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    asked = parser.parse_args()
    failed = False
    for model in asked.models:
        with tempfile.TemporaryDirectory() as folder:
            found: dict[str, Measured] = {}
            for way, cache in (("no cache", None), ("filling", Path(folder)), ("found", Path(folder))):
                with mp.get_context("spawn").Pool(1) as pool:
                    found[way] = pool.apply(train, (model, asked.photographs, asked.steps, asked.rows, cache))
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
        plain = found["no cache"]
        print(f"{model}: {plain.parameters / 1e6:.1f}M parameters, {plain.images} images, {size:.1f} MB kept")
        print(f"  {'':10} {'s a step':>9} {'of plain':>9} {'MB more':>9}   last loss")
        for way, one in found.items():
            gap = max(abs(mine / theirs - 1.0) for mine, theirs in zip(one.losses, plain.losses, strict=True))
            failed |= gap > TOLERANCE
            print(f"  {way:10} {one.seconds:9.3f} {one.seconds / plain.seconds:9.2f} {one.growth_mb:9.0f}   "
                  f"{one.losses[-1]:.6f} (largest difference {gap:.1e})")  # fmt: skip
        failed |= found["found"].found != plain.images
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
