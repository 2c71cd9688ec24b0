"""The sizes of the mini, which the checks of configurations are tried on."""

from __future__ import annotations

import pytest

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini_world import mini_model_config

TOKENS = ("<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


@pytest.fixture(scope="module")
def mini() -> Qwen3VLShape:
    ids = {token: index for index, token in enumerate(TOKENS)}
    return Qwen3VLShape.from_dict(mini_model_config(vocab_size=512, token_ids=ids))
