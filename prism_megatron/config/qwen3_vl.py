"""The sizes of a Qwen3-VL, read from its Hugging Face ``config.json``.

Every size comes from the file, in the hub's spelling (``rope_theta`` beside ``rope_scaling``) or in that of
transformers 5 (``rope_parameters``). transformers' class defaults differ from the published models (and between
versions), so nothing is taken from them: a missing key is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from prism_megatron.config.experts import ExpertSizes
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.errors import ConfigError, listed

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
TEXT_ACTIVATION = "silu"
VISION_ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class TextShape:
    """Sizes of the language tower. The three expert fields are 0 for a dense model."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    theta: float
    mrope_section: tuple[int, int, int]
    tied: bool
    num_experts: int
    experts_per_token: int
    expert_ffn: int

    @property
    def experts(self) -> ExpertSizes | None:
        """What every layer has in place of one MLP; None for a dense model."""
        if not self.num_experts:
            return None
        return ExpertSizes(self.num_experts, self.experts_per_token, self.expert_ffn)


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the vision tower. ``taps`` are the 0-based blocks whose output feeds DeepStack."""

    depth: int
    hidden: int
    heads: int
    ffn: int
    patch: int
    temporal_patch: int
    channels: int
    merge: int
    num_position_embeddings: int
    out_hidden: int
    taps: tuple[int, ...]

    @property
    def patch_dim(self) -> int:
        """Values per patch: channels · temporal_patch · patch · patch."""
        return self.channels * self.temporal_patch * self.patch * self.patch

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def grid_side(self) -> int:
        """Side of the square table of learned positions."""
        return math.isqrt(self.num_position_embeddings)


@dataclass(frozen=True)
class Qwen3VLShape:
    """A whole Qwen3-VL: both towers, the ids of its special tokens, and the dtype its weights are stored in."""

    text: TextShape
    vision: VisionShape
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: int
    pad_token_id: int
    dtype: str

    @classmethod
    def from_folder(cls, folder: str | Path) -> Qwen3VLShape:
        """Read ``config.json`` (and, for end and pad ids it lacks, ``generation_config.json``) of a model folder.

        Raises ConfigError for a missing or malformed file and for any missing or contradictory size.
        """
        folder = Path(folder)
        config = _read_json(folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        return cls.from_dict(config, generation=generation, where=str(folder / "config.json"))

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        *,
        generation: Mapping[str, Any] | None = None,
        where: str = "config",
    ) -> Qwen3VLShape:
        """Read the sizes from a parsed ``config.json``; ``where`` names the file in error messages.

        Raises ConfigError for a config that is no Qwen3-VL, or a variant that our model does not compute.
        """
        top = _Section(config, where)
        if (model_type := top.text("model_type")) not in MODEL_TYPES:
            raise ConfigError(f"{where}: model_type {model_type!r} is not a Qwen3-VL; expected one of {MODEL_TYPES}")
        text = top.section("text_config")
        vision = _vision_shape(top.section("vision_config"))
        text_shape = _text_shape(text, tied=top.flag("tie_word_embeddings"), sparse=model_type == "qwen3_vl_moe")
        if vision.out_hidden != text_shape.hidden:
            raise ConfigError(
                f"{where}: vision_config.out_hidden_size {vision.out_hidden} must equal "
                f"text_config.hidden_size {text_shape.hidden}"
            )
        if len(vision.taps) > text_shape.num_layers:
            raise ConfigError(
                f"{where}: {len(vision.taps)} DeepStack taps need as many language layers, "
                f"but text_config.num_hidden_layers is {text_shape.num_layers}"
            )
        eos = _first_id("eos_token_id", top.values, text.values, generation or {})
        if eos is None:
            raise ConfigError(f"{where}: eos_token_id is missing (also from generation_config.json); add it")
        # Hub configs have no pad id; their bos is the <|endoftext|> that pads. Padding is never read: any id will do.
        pad = _first_id("pad_token_id", top.values, text.values, generation or {})
        if pad is None:
            pad = _first_id("bos_token_id", top.values, text.values)
        return cls(
            text=text_shape,
            vision=vision,
            image_token_id=top.integer("image_token_id"),
            video_token_id=top.integer("video_token_id"),
            vision_start_token_id=top.integer("vision_start_token_id"),
            vision_end_token_id=top.integer("vision_end_token_id"),
            eos_token_id=eos,
            pad_token_id=eos if pad is None else pad,
            dtype=_dtype(top, text),
        )

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Raise ConfigError, naming the values that would do, for a layout this model cannot be cut into."""
        text, vision = self.text, self.vision
        cut_by_tp = {"attention heads": text.heads}
        if text.experts is None:
            cut_by_tp["ffn width"] = text.ffn
        cut_by_tp |= {"vision heads": vision.heads, "vision ffn width": vision.ffn}
        fitting = [tp for tp in range(1, text.heads + 1) if all(size % tp == 0 for size in cut_by_tp.values())]
        fitting = [tp for tp in fitting if text.kv_heads % tp == 0 or tp % text.kv_heads == 0]
        if parallel.tp not in fitting:
            raise ConfigError(
                f"--tp {parallel.tp} does not divide the model ({text.kv_heads} key/value heads, "
                + ", ".join(f"{size} {name}" for name, size in cut_by_tp.items())
                + f"); use one of {listed(fitting)}"
            )
        if text.experts is not None:
            text.experts.check_layout(parallel)
        parallel.stage_layers(text.num_layers)
        if parallel.cp > 1 and parallel.cp_comm == "a2a":
            # A kv head that tp ranks share is whole on each of them.
            kv_heads = max(1, text.kv_heads // parallel.tp)
            if kv_heads % parallel.cp or (text.heads // parallel.tp) % parallel.cp:
                raise ConfigError(
                    f"--cp {parallel.cp} --cp-comm a2a gives each rank a share of the heads, but a tensor-parallel "
                    f"rank has {text.heads // parallel.tp} of them with {kv_heads} key/value heads; "
                    f"use --cp-comm all_gather or a --cp that divides {kv_heads}"
                )


class _Section:
    """One JSON object with typed access; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def _get(self, *names: str) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        spelled = " or ".join(repr(name) for name in names)
        raise ConfigError(f"{self.where}: key {spelled} is missing; class defaults are not used, so write it out")

    def _typed(self, kind: type[int | float | str | bool | dict[str, Any]], *names: str) -> Any:
        value = self._get(*names)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.where}: key {names[0]!r} is {value!r}, expected {kind.__name__}")
        return value

    def integer(self, *names: str) -> int:
        """A whole number. Raises ConfigError for anything else."""
        value = int(self._typed(int, *names))
        if value < 0:
            raise ConfigError(f"{self.where}: key {names[0]!r} is {value}, expected a count or an id of at least 0")
        return value

    def size(self, *names: str) -> int:
        """A whole number of at least 1. Raises ConfigError for anything else."""
        if (value := self.integer(*names)) == 0:
            raise ConfigError(f"{self.where}: key {names[0]!r} is 0, expected a positive size")
        return value

    def number(self, *names: str) -> float:
        return float(self._typed(float, *names))

    def text(self, *names: str) -> str:
        return str(self._typed(str, *names))

    def flag(self, *names: str) -> bool:
        return bool(self._typed(bool, *names))

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers. Raises ConfigError for anything else."""
        value = self._get(name)
        if not isinstance(value, list) or not all(isinstance(item, int) and item >= 0 for item in value):
            raise ConfigError(f"{self.where}: key {name!r} is {value!r}, expected a list of integers")
        return tuple(value)

    def section(self, *names: str) -> _Section:
        return _Section(self._typed(dict, *names), f"{self.where}: {names[0]}")

    def expect(self, name: str, wanted: object) -> None:
        """Refuse a variant that our model does not compute. Raises ConfigError."""
        if self.values.get(name, wanted) != wanted:
            raise ConfigError(f"{self.where}: {name} is {self.values[name]!r}; only {wanted!r} is supported")


def _text_shape(text: _Section, *, tied: bool, sparse: bool) -> TextShape:
    text.expect("attention_bias", False)
    text.expect("hidden_act", TEXT_ACTIVATION)
    rope = text.section("rope_parameters", "rope_scaling")
    rope.expect("rope_type", "default")
    rope.expect("mrope_interleaved", True)
    theta = rope.number("rope_theta") if "rope_theta" in rope.values else text.number("rope_theta")
    head_dim = text.size("head_dim")
    mrope_section = rope.integers("mrope_section")
    if len(mrope_section) != 3 or sum(mrope_section) * 2 != head_dim:
        raise ConfigError(
            f"{rope.where}: mrope_section {list(mrope_section)} must be three counts that add up to half of "
            f"head_dim {head_dim}"
        )
    heads, kv_heads = text.size("num_attention_heads"), text.size("num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(
            f"{text.where}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}"
        )
    if sparse:
        if text.size("num_experts_per_tok") > _num_experts(text):
            raise ConfigError(
                f"{text.where}: num_experts_per_tok {text.size('num_experts_per_tok')} is more than there are experts"
            )
        text.expect("decoder_sparse_step", 1)
        text.expect("mlp_only_layers", [])
        text.expect("norm_topk_prob", True)
    return TextShape(
        num_layers=text.size("num_hidden_layers"),
        hidden=text.size("hidden_size"),
        ffn=text.size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=text.size("vocab_size"),
        eps=text.number("rms_norm_eps"),
        theta=theta,
        mrope_section=(mrope_section[0], mrope_section[1], mrope_section[2]),
        tied=tied,
        num_experts=_num_experts(text) if sparse else 0,
        experts_per_token=text.size("num_experts_per_tok") if sparse else 0,
        expert_ffn=text.size("moe_intermediate_size") if sparse else 0,
    )


def _num_experts(text: _Section) -> int:
    """Experts of a layer, under the name that the published configs have or the one that transformers writes."""
    names = [name for name in ("num_experts", "num_local_experts") if text.values.get(name) is not None]
    if len({text.size(name) for name in names}) > 1:
        raise ConfigError(
            f"{text.where}: num_experts is {text.values['num_experts']} but num_local_experts is "
            f"{text.values['num_local_experts']}; they are two names of one number, so remove the wrong one"
        )
    return text.size("num_experts", "num_local_experts")


def _vision_shape(vision: _Section) -> VisionShape:
    vision.expect("hidden_act", VISION_ACTIVATION)
    shape = VisionShape(
        depth=vision.size("depth"),
        hidden=vision.size("hidden_size"),
        heads=vision.size("num_heads"),
        ffn=vision.size("intermediate_size"),
        patch=vision.size("patch_size"),
        temporal_patch=vision.size("temporal_patch_size"),
        channels=vision.size("in_channels"),
        merge=vision.size("spatial_merge_size"),
        num_position_embeddings=vision.size("num_position_embeddings"),
        out_hidden=vision.size("out_hidden_size"),
        taps=vision.integers("deepstack_visual_indexes"),
    )
    if shape.hidden % (4 * shape.heads):
        raise ConfigError(
            f"{vision.where}: hidden_size {shape.hidden} must be a multiple of 4 · num_heads = {4 * shape.heads}"
        )
    if shape.grid_side**2 != shape.num_position_embeddings:
        raise ConfigError(f"{vision.where}: num_position_embeddings {shape.num_position_embeddings} is not a square")
    if list(shape.taps) != sorted(set(shape.taps)) or any(tap >= shape.depth for tap in shape.taps):
        raise ConfigError(
            f"{vision.where}: deepstack_visual_indexes {list(shape.taps)} must ascend and lie below depth {shape.depth}"
        )
    return shape


def _first_id(name: str, *places: Mapping[str, Any]) -> int | None:
    """The first value found; a generation config may list several end tokens, of which the first ends a turn."""
    for place in places:
        value = place.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return None


def _dtype(top: _Section, text: _Section) -> str:
    for place in (top.values, text.values):
        for name in ("dtype", "torch_dtype"):
            if isinstance(place.get(name), str):
                return str(place[name])
    # save_pretrained leaves dtype out of a config whose model was built in torch's default dtype.
    return "float32"


def _read_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ConfigError(f"{path} holds {constant}, which is not JSON")

    try:
        parsed = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give a Hugging Face model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path} holds {type(parsed).__name__}, expected a JSON object")
    return parsed
