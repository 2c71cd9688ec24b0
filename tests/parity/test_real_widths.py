"""Claim: parity holds at the widths of the published 2B model, with its vocabulary, tokenizer and a real image.

Two language layers and two vision blocks of Qwen3-VL-2B's config with random weights; every other size is as published.
Blind spot: the published weights, which are not here (``tools/verify.py --hf`` is for those), and depth.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.tools.verify import VerifyConfig
from prism_megatron.engine.runtime import World
from prism_megatron.parity.report import GIB, Report
from prism_megatron.parity.verify import verify
from prism_megatron.testing import GlooWorld

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
MAX_GIB = 12


@pytest.fixture(scope="module")
def folder(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 2B config with two layers and two blocks, both tapped; random weights; the real tokenizer."""
    path = tmp_path_factory.mktemp("2B-widths")
    config = json.loads((shared_dir / "qwen3_vl" / "configs" / "2B.json").read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = 2
    config["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    config["dtype"] = "float32"
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config))
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(shared_dir / "qwen3_vl" / name, path / name)
    return path


def verified(world: World, config: VerifyConfig) -> Report | None:
    torch.set_num_threads(2)
    return verify(world, config)


@pytest.mark.long
def test_2b_widths_equal_transformers(folder: Path, shared_dir: Path) -> None:
    """Claim: float32 tolerances, in one process of at most 12 GiB."""
    shape = Qwen3VLShape.from_folder(folder)
    assert (shape.text.hidden, shape.text.vocab, shape.vision.hidden) == (2048, 151936, 1024)
    image = min(shared_dir.glob("data/*/images/*.png"), key=lambda path: (path.stat().st_size, path.name))
    with GlooWorld(1) as gloo:
        (report,) = gloo.run(verified, VerifyConfig(hf=str(folder), image=(str(image),)))
    print(report.text())
    assert report.num_images >= 1
    assert report.ok
    assert report.peak_bytes <= MAX_GIB * GIB
