"""Do policy and discriminator read the same tokens and patches? One batch of ids and pixels is made for both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.errors import ConfigError

_TOKENIZER, _PREPROCESSOR = "tokenizer.json", "preprocessor_config.json"
_COLOURS = ("image_mean", "image_std")
_SPECIAL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_PATCHES = ("patch", "temporal_patch", "channels", "merge")


def check_same_inputs(policy: Path, discriminator: Path, *, where: str | Path) -> None:
    """Raise ConfigError unless what the policy reads means the same to the discriminator.

    The arguments are folders with config, tokenizer and preprocessor; ``where`` is what the user named as
    ``--discriminator``. Sizes, rotary bases and DeepStack taps are each model's own and may differ.
    """
    ours, theirs = Qwen3VLShape.from_folder(policy), Qwen3VLShape.from_folder(discriminator)
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(ours, name), getattr(theirs, name)) for name in _SPECIAL_TOKENS}
    pairs |= {f"vision {name}": (getattr(ours.vision, name), getattr(theirs.vision, name)) for name in _PATCHES}
    settings = _read(policy / _PREPROCESSOR), _read(discriminator / _PREPROCESSOR)
    pairs |= {name: (settings[0].get(name), settings[1].get(name)) for name in _COLOURS}
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
    tokens, others = _tokens(policy / _TOKENIZER), _tokens(discriminator / _TOKENIZER)
    if tokens != others:
        token_id = min(token_id for token_id, _ in tokens.items() ^ others.items())
        raise ConfigError(
            f"--discriminator {where} has another tokenizer than the policy: token {token_id} is "
            f"{others.get(token_id)!r} to it and {tokens.get(token_id)!r} to the policy; make one of a dense Qwen3-VL "
            "with the policy's tokenizer"
        )


def _tokens(path: Path) -> dict[int, str]:
    """Every token by its id."""
    document = _read(path)
    try:
        found = {token_id: token for token, token_id in document["model"]["vocab"].items()}
        return found | {token["id"]: token["content"] for token in document["added_tokens"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no tokenizer of a Qwen3-VL ({error!r}); copy it from the model's Hugging Face folder"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy it from the model's Hugging Face folder") from error
    return document
