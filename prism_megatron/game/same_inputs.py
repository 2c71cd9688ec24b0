"""Do policy and discriminator read the same tokens and patches? One batch of ids and pixels is made for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.data.reading.model_files import image_settings, tokens
from prism_megatron.errors import ConfigError

_COLOURS = ("image_mean", "image_std")
_SPECIAL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_PATCHES = ("patch", "temporal_patch", "channels", "merge")


def check_same_inputs(policy: Path, discriminator: Path, *, where: str | Path) -> None:
    """Raise ConfigError unless what the policy reads means the same to the discriminator.

    DataError where one of the folders lacks such files.

    The arguments are folders with config, tokenizer and preprocessor; ``where`` is what the user named as
    ``--discriminator``. Sizes, rotary bases and DeepStack taps are each model's own and may differ.
    """
    ours, theirs = Qwen3VLShape.from_folder(policy), Qwen3VLShape.from_folder(discriminator)
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(ours, name), getattr(theirs, name)) for name in _SPECIAL_TOKENS}
    pairs |= {f"vision {name}": (getattr(ours.vision, name), getattr(theirs.vision, name)) for name in _PATCHES}
    settings = image_settings(policy), image_settings(discriminator)
    pairs |= {name: (settings[0][name], settings[1][name]) for name in _COLOURS}
    for name, (one, other) in pairs.items():
        if one != other:
            raise ConfigError(
                f"--discriminator {where} reads other inputs than the policy: its {name} is {other}, the policy's "
                f"{one}; make one of a dense Qwen3-VL with the policy's tokenizer and image preprocessing"
            )
    if theirs.text.vocab < ours.text.vocab:
        raise ConfigError(
            f"--discriminator {where} knows {theirs.text.vocab} tokens and the policy {ours.text.vocab}; make one of a "
            "dense Qwen3-VL with the policy's vocabulary"
        )
    mine, others = tokens(policy), tokens(discriminator)
    if mine != others:
        token_id = min(token_id for token_id, _ in mine.items() ^ others.items())
        raise ConfigError(
            f"--discriminator {where} has another tokenizer than the policy: token {token_id} is "
            f"{others.get(token_id)!r} to it and {mine.get(token_id)!r} to the policy; make one of a dense Qwen3-VL "
            "with the policy's tokenizer"
        )
