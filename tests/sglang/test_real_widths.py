"""Claim: what holds for the mini holds at the widths of the published 2B model, with its vocabulary and tokenizer.

Two language layers and two vision blocks of Qwen3-VL-2B's config with random weights, in fp32 on all sides: a server,
transformers, and our Megatron policy at TP2·PP2. Weights travel by disk, as they should where the server reads the same
files. Blind spots: the published weights, and depth.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.data.render import Renderer
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.sglang.arguments import PYTHON, ServerOptions
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.server import SGLangServers
from prism_megatron.testing import GlooWorld
from prism_megatron.types import Rollout
from tests.sglang.conftest import REPOSITORY, World
from tests.sglang.policy_ranks import as_groups, score

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
TOLERANCE = 1e-4


def build(folder: Path, source: Path) -> Any:
    """The cut-down 2B model with random weights, saved in ``folder`` with the real tokenizer."""
    config = json.loads((source / "configs" / "2B.json").read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = 2
    config["vision_config"] |= {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    config["dtype"] = "float32"
    model_class: Any = Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    model = model_class(Qwen3VLConfig.from_dict(config)).float().eval()  # text_config asks for bf16
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, folder / name)
    return model


def test_logprobs_and_an_update_at_the_widths_of_2b(shared_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    oracle = build(folder, shared_dir / "qwen3_vl")
    renderer = Renderer.from_folder(folder)
    options = ServerOptions(
        model=folder,
        logs=tmp_path / "logs",
        python=REPOSITORY / PYTHON,
        dtype="float32",
        context_length=1024,
        max_total_tokens=4096,
        max_running_requests=8,
        start_seconds=400.0,
    )
    servers = SGLangServers(options, count=1)
    servers.start()
    engine = SGLangRollout(
        folder,
        renderer.segment_finder,
        urls=servers.urls,
        api_key=servers.api_key,
        end_token_ids=[renderer.end_token_id],
        spool=tmp_path,
        servers=servers,
        options=SGLangOptions(transport="disk"),
    )
    world = World(servers, engine, renderer, oracle, tmp_path)
    prompts, sampling = world.prompts(), Sampling(max_new_tokens=8)
    drawn: list[list[tuple[Rollout, ...]]] = []
    try:
        for version in (1, 2):
            engine.update_weights(weights_of(oracle), version)
            drawn.append(engine.generate(SampleRequest(prompts, 2, sampling, seed=0, step=0)))
            for prompt, group in zip(prompts, drawn[-1], strict=True):
                assert world.gap(prompt, group) <= TOLERANCE, (version, prompt.id)
            step(oracle)
    finally:
        engine.close()
    with GlooWorld(4, timeout_s=500.0) as gloo:
        layout = ParallelConfig(tp=2, pp=2)
        gaps, *_ = gloo.run(score, folder, as_groups(prompts, drawn[0]), sampling, parallel=layout)
    assert max(gaps) <= TOLERANCE, gaps
    assert min(gaps) > 0.0, "blind: nothing was compared"


def weights_of(oracle: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in oracle.state_dict().items() if name != "lm_head.weight"]


@torch.no_grad()
def step(oracle: Any) -> None:
    """Move every matrix, the vision tower's too, far enough that old weights or old features would show."""
    for parameter in oracle.parameters():
        if parameter.dim() > 1:
            parameter.mul_(0.9).add_(parameter.roll(1, 0), alpha=0.1)
