"""The sizes of a Qwen3-VL, read from its Hugging Face ``config.json``.

Every size comes from the file, in the hub's spelling or in that of transformers 5; where both stand there they have to
agree. transformers' class defaults differ from the published models (and between versions), so nothing is taken from
them: a missing key is an error. ``rope.py`` reads rotary positions; ``qwen3_vl_keys.py`` has the keys that may not say
anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config.architecture.qwen3_vl_keys import ANYWHERE, TEXT, TOP, VISION, check_copies, check_unread
from prism_megatron.config.architecture.rope import check_vision_rope, text_rope
from prism_megatron.config.engine.experts import ExpertSizes
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.json_file import read_object
from prism_megatron.config.json_section import Section
from prism_megatron.errors import ConfigError, listed

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
EXPERT_COUNT = ("num_experts", "num_local_experts")
"""Two names of one number: that of the published configs, and the one that transformers 5 writes."""
TEXT_ACTIVATION = "silu"
VISION_ACTIVATION = "gelu_pytorch_tanh"
STORED_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""What a config may state as the format of its weights."""


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

    @property
    def model_type(self) -> str:
        """The name that config.json has for its kind."""
        return MODEL_TYPES[self.text.experts is not None]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Qwen3VLShape:
        """Read ``config.json`` (and, for end and pad ids it lacks, ``generation_config.json``) of a model folder.

        Raises ConfigError for a missing or malformed file and for any missing or contradictory size.
        """
        folder = Path(folder)
        if not (folder / "config.json").exists():
            raise ConfigError(f"{folder / 'config.json'} does not exist; give a Hugging Face model folder")
        config = read_object(folder / "config.json", error=ConfigError)
        generation_path = folder / "generation_config.json"
        generation = read_object(generation_path, error=ConfigError) if generation_path.exists() else {}
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
        top = Section(config, where)
        if (model_type := top.text("model_type")) not in MODEL_TYPES:
            raise ConfigError(f"{where}: model_type {model_type!r} is not a Qwen3-VL; expected one of {MODEL_TYPES}")
        sections = {"text_config": TEXT, "vision_config": VISION}
        text, vision_part = (top.section(name) for name in sections)
        for section, allowed in ((top, TOP), *zip((text, vision_part), sections.values(), strict=True)):
            check_unread(section, {**ANYWHERE, **allowed})
        vision = _vision_shape(vision_part)
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
        shape = cls(
            text=text_shape,
            vision=vision,
            image_token_id=_special_id(top, "image_token_id", text_shape.vocab),
            video_token_id=_special_id(top, "video_token_id", text_shape.vocab),
            vision_start_token_id=_special_id(top, "vision_start_token_id", text_shape.vocab),
            vision_end_token_id=_special_id(top, "vision_end_token_id", text_shape.vocab),
            eos_token_id=eos,
            pad_token_id=_pad_id(top, text, generation or {}, eos=eos, vocab=text_shape.vocab),
            dtype=_dtype(top, text, vision_part),
        )
        check_copies(top, text, vision_part)
        return shape

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


def _text_shape(text: Section, *, tied: bool, sparse: bool) -> TextShape:
    text.expect("attention_bias", False)
    text.expect("hidden_act", TEXT_ACTIVATION)
    rope, num_layers = text_rope(text), text.size("num_hidden_layers")
    text.expect("layer_types", ["full_attention"] * num_layers)
    heads, kv_heads = text.size("num_attention_heads"), text.size("num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(
            f"{text.where}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}"
        )
    if sparse:
        if text.size("num_experts_per_tok") > text.size(*EXPERT_COUNT):
            raise ConfigError(
                f"{text.where}: num_experts_per_tok {text.size('num_experts_per_tok')} is more than there are experts"
            )
        text.expect("decoder_sparse_step", 1)
        text.expect("mlp_only_layers", [], None)
        text.expect("norm_topk_prob", True)
    return TextShape(
        num_layers=num_layers,
        hidden=text.size("hidden_size"),
        ffn=text.size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=text.size("head_dim"),
        vocab=text.size("vocab_size"),
        eps=text.number("rms_norm_eps"),
        theta=rope.theta,
        mrope_section=rope.mrope_section,
        tied=tied,
        num_experts=text.size(*EXPERT_COUNT) if sparse else 0,
        experts_per_token=text.size("num_experts_per_tok") if sparse else 0,
        expert_ffn=text.size("moe_intermediate_size") if sparse else 0,
    )


def _vision_shape(vision: Section) -> VisionShape:
    vision.expect("hidden_act", VISION_ACTIVATION)
    shape = VisionShape(
        depth=vision.size("depth", "num_hidden_layers"),
        hidden=vision.size("hidden_size"),
        heads=vision.size("num_heads", "num_attention_heads"),
        ffn=vision.size("intermediate_size"),
        patch=vision.size("patch_size"),
        temporal_patch=vision.size("temporal_patch_size"),
        channels=vision.size("in_channels"),
        merge=vision.size("spatial_merge_size"),
        num_position_embeddings=vision.size("num_position_embeddings"),
        out_hidden=vision.size("out_hidden_size"),
        taps=vision.integers("deepstack_visual_indexes"),
    )
    check_vision_rope(vision)
    vision.expect("head_dim", shape.head_dim, None)
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
        if type(value) is int:
            return value
    return None


def _special_id(top: Section, name: str, vocab: int) -> int:
    found = top.integer(name)
    if found >= vocab:
        raise ConfigError(f"{top.where}: {name} is {found}, but text_config.vocab_size is {vocab}; correct one of them")
    return found


def _pad_id(top: Section, text: Section, generation: Mapping[str, Any], *, eos: int, vocab: int) -> int:
    """Hub configs have no pad id; their bos is the <|endoftext|> that pads. Padding is never read: any id will do."""
    places = (top.values, text.values, generation)
    for name, where in (("pad_token_id", places), ("bos_token_id", places[:2])):
        found = _first_id(name, *where)
        if found is not None and found >= vocab:
            raise ConfigError(
                f"{top.where}: {name} is {found}, but text_config.vocab_size is {vocab}; correct one of them"
            )
        if found is not None and found >= 0:  # some configs say -1 for none
            return found
    return eos


def _dtype(top: Section, *sections: Section) -> str:
    """What the top level states, or the language tower where that is silent."""
    stated = []
    for section in (top, *sections):
        name = section.get("dtype", "torch_dtype")
        if name is not None and name not in STORED_DTYPES:
            raise ConfigError(f"{section.where}: dtype is {name!r}, expected one of {', '.join(STORED_DTYPES)}")
        stated.append(name)
    # save_pretrained leaves dtype out of a config whose model was built in torch's default dtype.
    return next((name for name in stated[:2] if name is not None), "float32")


def max_positions(config: Mapping[str, Any], where: str) -> int | None:
    """The longest sequence that the parsed ``config.json`` of a Qwen3-VL allows; None where it does not say.

    Raises ConfigError for anything but a positive number.
    """
    text = Section(config, where).section("text_config")
    return None if text.get("max_position_embeddings") is None else text.size("max_position_embeddings")
