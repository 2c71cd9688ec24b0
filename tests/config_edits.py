"""Random edits of a Qwen3-VL's files: keys renamed, moved, repeated, contradicting, unknown, or of another type.

The bases are the six published configs and tiny ones, each in the hub's spelling and in that of transformers 5, with
widths of the mini's: their own keys, so that a model of each takes a moment.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.presets import PRESETS, hf_config, preset

POLICY = MINI_FOLDER / "policy"
Config = dict[str, Any]

_MINI: Config = json.loads((POLICY / "config.json").read_text())
_TEXT_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_VISION_WIDTHS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_position_embeddings",
    "out_hidden_size",
)
_TOP = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
NUM_LAYERS = 3

NAMES = {
    "rope_scaling": "rope_parameters",
    "rope_parameters": "rope_scaling",
    "rope_type": "type",
    "dtype": "torch_dtype",
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "num_heads": "num_attention_heads",
    "depth": "num_hidden_layers",
    "in_channels": "in_chans",
    "hidden_act": "hidden_activation",
    "rms_norm_eps": "layer_norm_eps",
}
"""What a key is called elsewhere: by transformers, by another version of it, or by another model."""
YARN: Config = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
STRANGERS: tuple[tuple[str, Any], ...] = (
    ("rope_scaling", YARN),
    ("rope_scaling", {("type" if key == "rope_type" else key): value for key, value in YARN.items()}),
    ("rope_scaling", {"type": "linear", "factor": 2.0, "mrope_section": [4, 2, 2]}),
    ("rope_scaling", {"type": "mrope", "mrope_section": [4, 2, 2]}),
    ("rope_scaling", {}),
    ("rope_parameters", YARN),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 77.0, "mrope_section": [4, 2, 2]}),
    ("rope_parameters", {"rope_type": "axial", "rope_theta": 10000.0}),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 77.0}}),
    ("rope_theta", 77.0),
    ("partial_rotary_factor", 0.5),
    ("head_dim", 8),
    ("layer_types", ["full_attention"] * NUM_LAYERS),
    ("layer_types", ["sliding_attention"] * NUM_LAYERS),
    ("sliding_window", 4),
    ("attention_chunk_size", 4),
    ("is_causal", False),
    ("attention_bias", True),
    ("attention_dropout", 0.5),
    ("tie_word_embeddings", True),
    ("tie_word_embeddings", False),
    ("pad_token_id", 5),
    ("pad_token_id", -1),
    ("pad_token_id", 100_000),
    ("eos_token_id", [486, 488]),
    ("image_token_id", 7),
    ("per_layer_config", {"0": {"rms_norm_eps": 0.1}}),
    ("attribute_map", {"rms_norm_eps": "initializer_range"}),
    ("configuration_files", ["config.4.0.0.json"]),
    ("transformers_weights", "other.safetensors"),
    ("fusion_config", {"patch_embeddings": True}),
    ("return_dict", False),
    ("output_attentions", True),
    ("output_hidden_states", True),
    ("output_router_logits", True),
    ("is_encoder_decoder", True),
    ("attn_implementation", "eager"),
    ("_attn_implementation", "eager"),
    ("experts_implementation", "eager"),
    ("id2label", {"0": "a"}),
    ("problem_type", "regression"),
    ("norm_topk_prob", False),
    ("norm_topk_prob", True),
    ("decoder_sparse_step", 2),
    ("mlp_only_layers", [1]),
    ("mlp_only_layers", None),
    ("num_experts_per_tok", 1),
    ("shared_expert_intermediate_size", 32),
    ("hidden_act", "gelu"),
    ("rms_norm_eps", 1e-2),
    ("spatial_merge_size", 1),
    ("use_cache", False),
    ("gradient_checkpointing", True),
    ("architectures", ["Another"]),
    ("model_type", "qwen2_vl"),
    ("name_or_path", "org/name"),
    ("transformers_version", "4.57.1"),
    ("a_key_that_nobody_knows", [1, {"a": 2}]),
)
"""Keys with a meaning for transformers, for other models, or for nobody."""


def bases(shared: Path | None) -> dict[str, Config]:
    """Configs of tiny models by name; without ``shared`` the published ones are written from their sizes."""
    published = {
        name: hf_config(preset(name))
        if shared is None
        else json.loads((shared / "qwen3_vl" / "configs" / f"{name}.json").read_text())
        for name in PRESETS
    }
    made = {name: shrunk(config) for name, config in published.items()}
    made["tiny"] = shrunk({**_MINI, "tie_word_embeddings": False})
    return made | {f"{name}, of transformers 5": as_transformers_saves(config) for name, config in made.items()}


def shrunk(config: Mapping[str, Any]) -> Config:
    """The keys of ``config`` and the widths, tokens and position sections of the mini."""
    small = copy.deepcopy(dict(config))
    text, vision = small["text_config"], small["vision_config"]
    text |= {key: _MINI["text_config"][key] for key in _TEXT_WIDTHS} | {"num_hidden_layers": NUM_LAYERS}
    vision |= {key: _MINI["vision_config"][key] for key in _VISION_WIDTHS} | {"deepstack_visual_indexes": [0, 1, 2]}
    text["rope_scaling"]["mrope_section"] = [4, 2, 2]
    small |= {key: _MINI[key] for key in _TOP}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in text:
            text[key] = _MINI["text_config"][key]
    if "num_experts" in text:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return small


def as_transformers_saves(config: Config) -> Config:
    """``config`` through transformers' own class."""
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    kind: Any = Qwen3VLMoeConfig if "moe" in config["model_type"] else Qwen3VLConfig
    saved: Config = json.loads(kind.from_dict(copy.deepcopy(config)).to_json_string())
    return saved


def write_base(folder: Path, config: Config) -> None:
    """The model of ``config`` with random weights, beside the mini's tokenizer, template and image settings."""
    from prism_megatron.parity.tiny import tiny_model

    tiny_model(config).save_pretrained(folder)
    for path in POLICY.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))


def write_edited(base: Path, folder: Path, config: Config) -> None:
    """``base`` with another config; the weights are the same file."""
    folder.mkdir()
    for path in base.iterdir():
        os.link(path, folder / path.name)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))


def edited(config: Config, chance: random.Random) -> tuple[Config, str]:
    """``config`` after one to three edits, and what they were."""
    made, said = copy.deepcopy(config), []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        edit = chance.choice(_EDITS)
        said.append(edit(made, chance))
    return made, "; ".join(said)


def _places(config: Config) -> dict[str, Config]:
    """Every object in the config by its path."""
    found = {"top": config}
    for name in ("text_config", "vision_config"):
        if isinstance(part := config.get(name), dict):
            found[name] = part
            for rope in ("rope_scaling", "rope_parameters"):
                if isinstance(part.get(rope), dict):
                    found[f"{name}.{rope}"] = part[rope]
    return found


def _pick(config: Config, chance: random.Random) -> tuple[str, Config, str]:
    """A key in a random place; the sections themselves are left alone."""
    where, place = chance.choice([item for item in _places(config).items() if item[1]])
    keys = sorted(key for key in place if key not in ("text_config", "vision_config"))
    return where, place, chance.choice(keys or sorted(place))


def _rename(config: Config, chance: random.Random) -> str:
    known = [(where, place, key) for where, place in _places(config).items() for key in sorted(place) if key in NAMES]
    where, place, key = chance.choice(known) if known and chance.random() < 0.8 else _pick(config, chance)
    new = NAMES.get(key, f"{key}s")
    place[new] = place.pop(key)
    return f"{where}: {key} is called {new}"


def _move(config: Config, chance: random.Random) -> str:
    where, place, key = _pick(config, chance)
    to = chance.choice(sorted(_places(config)))
    target = _places(config)[to]
    value = place.pop(key)
    target[key] = value
    return f"{key} moved from {where} to {to}"


def _repeat(config: Config, chance: random.Random) -> str:
    """Somewhere else, or under another name, as it is or not."""
    where, place, key = _pick(config, chance)
    to = chance.choice(sorted(_places(config)))
    new = NAMES.get(key, key) if chance.random() < 0.5 else key
    value = place[key] if chance.random() < 0.5 else _another(place[key], chance)
    _places(config)[to][new] = copy.deepcopy(value)
    return f"{key} of {where} repeated in {to} as {new} = {value!r}"


def _stranger(config: Config, chance: random.Random) -> str:
    to = chance.choice([name for name in _places(config) if "rope" not in name])
    key, value = chance.choice(STRANGERS)
    _places(config)[to][key] = copy.deepcopy(value)
    return f"{key} = {value!r} written into {to}"


def _retype(config: Config, chance: random.Random) -> str:
    where, place, key = _pick(config, chance)
    place[key] = _another(place[key], chance)
    return f"{where}: {key} = {place[key]!r}"


def _remove(config: Config, chance: random.Random) -> str:
    where, place, key = _pick(config, chance)
    del place[key]
    return f"{where}: {key} removed"


def _another(value: Any, chance: random.Random) -> Any:
    changed: list[Any] = [None, str(value), [value], {}]
    if isinstance(value, bool):
        changed += [not value, int(value)]
    elif isinstance(value, int | float):
        changed += [value + 1, -value, float(value), int(value), value * 2, True]
    elif isinstance(value, list):
        changed += [
            value[::-1],
            value[:-1],
            [*value, 1],
            [float(one) if isinstance(one, int) else one for one in value],
        ]
    elif isinstance(value, dict):
        changed += [{**value, "type": "linear"}, {**value, "rope_theta": 77.0}, YARN]
    elif isinstance(value, str):
        changed += [value.upper(), f"{value}_", "default", "float16"]
    return chance.choice(changed)


_EDITS: tuple[Callable[[Config, random.Random], str], ...] = (
    _rename,
    _move,
    _repeat,
    _repeat,
    _stranger,
    _stranger,
    _retype,
    _remove,
)
