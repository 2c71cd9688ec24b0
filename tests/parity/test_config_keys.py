"""Every key that transformers' Qwen3-VL acts on is read by us, refused, or listed here as one that changes nothing.

The keys are found in transformers itself: the fields, aliases and class attributes of its six config classes, and every
name that its code reads from a config, by a walk over the syntax of the modules that these models go through. A newer
transformers that reads one more makes this fail. Blind spots: names that its code puts together while it runs, and the
arguments of ``generate``, which ``PreTrainedConfig`` throws away.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from transformers import GenerationConfig, cache_utils, configuration_utils, masking_utils, modeling_rope_utils
from transformers import modeling_utils as model_loading
from transformers.integrations import moe, sdpa_attention
from transformers.integrations.heterogeneity import configuration_utils as per_layer
from transformers.models.qwen3_vl import configuration_qwen3_vl as dense_configs
from transformers.models.qwen3_vl import modeling_qwen3_vl as dense
from transformers.models.qwen3_vl_moe import configuration_qwen3_vl_moe as moe_configs
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as with_experts

from prism_megatron.config.architecture import qwen3_vl, qwen3_vl_keys
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.json_section import Section
from prism_megatron.config.presets import hf_config, preset

CLASSES: dict[str, list[Any]] = {
    "top": [dense_configs.Qwen3VLConfig, moe_configs.Qwen3VLMoeConfig],
    "text_config": [dense_configs.Qwen3VLTextConfig, moe_configs.Qwen3VLMoeTextConfig],
    "vision_config": [dense_configs.Qwen3VLVisionConfig, moe_configs.Qwen3VLMoeVisionConfig],
}
ALL = [kind for kinds in CLASSES.values() for kind in kinds]
OF_CONFIGS = (configuration_utils, modeling_rope_utils, per_layer, dense_configs, moe_configs)
OF_MODELS = (dense, with_experts, masking_utils, cache_utils, model_loading, sdpa_attention, moe)

CHANGES_NOTHING: dict[str, tuple[str, ...]] = {
    "names for the reader, and how a config was come by": (
        "architectures", "transformers_version", "name_or_path", "_name_or_path", "_commit_hash", "model_type",
        "_configuration_file", "_from_auto", "_from_pipeline", "_auto_class", "_config", "_post_init_done", "auto_map",
    ),
    "labels of classifiers, which have another head": ("id2label", "label2id", "num_labels", "problem_type"),
    "what forward returns beside logits, or how; the loss of routers is asked for with labels": (
        "output_hidden_states", "_output_attentions", "output_router_logits", "router_aux_loss_coef", "use_cache",
    ),
    "weights before any are loaded": ("initializer_range", "init_std", "initializer_factor"),
    "kernels for the same arithmetic; whoever loads the model chooses attention": (
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
        "_experts_implementation", "_experts_implementation_internal", "gradient_checkpointing", "compile_config",
        "disable_mmap", "device_map", "device_mesh", "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan",
        "base_model_fsdp_plan", "chunk_size_feed_forward",
    ),
    "class attributes that are used before a file's keys are set over them": (
        "default_theta", "default_rope_type", "ignore_keys_at_rope_validation", "base_config_key",
        "sub_configs_defaults", "sub_configs", "keys_to_ignore_at_inference", "extra_config_files",
    ),
    "of scaled positions, which are refused; the kind is read where they stand (config/architecture/rope.py)": (
        "rope_type",
        "original_max_position_embeddings", "original_inv_freq", "max_seq_len_cached", "original_max_seq_len",
        "attention_scaling", "config", "register_buffer",
    ),
    "of layers of other kinds and of predictors of further tokens, which Qwen3-VL has none of": (
        "mlp_layer_types", "mtp_layer_types", "mtp_mlp_layer_types", "mtp_per_layer_config", "num_mtp_layers",
        "first_k_dense_replace", "number_of_conv_states", "embed_dim",
    ),
    "tokens that end, begin or fill a text: of the tokenizer and of generation_config.json": (
        "eos_token_id", "bos_token_id", "sep_token_id", "pad_token_id",
    ),
    "read by whoever starts a server, and for scaled positions": ("max_position_embeddings",),
    "read with the weights (conversion/hf/open_source.py)": ("quantization_config", "is_quantized", "hf_quantizer",
                                                         "quant_method"),
    "arguments of from_pretrained and methods of what is no config": (
        "__class__", "__dict__", "cache_dir", "commit_message", "config_class", "force_download", "gguf_file",
        "init_kwargs", "local_files_only", "optional", "proxies", "repo_id", "return_unused_kwargs", "revision",
        "subfolder", "token", "trust_remote_code", "fget", "get_config_class", "items", "setter", "skip", "get",
        "adapter_kwargs", "adapter_name", "allow_all_kernels", "allow_is_causal_skip", "create_compatible_mapping",
        "create_pr", "device", "disk_offload_folder", "generation_config", "ignore_mismatched_sizes", "kernel_config",
        "key_mapping", "max_memory", "offload_buffers", "offload_folder", "output_loading_info",
        "pretrained_model_name_or_path", "sanitize_kernel_mapping", "sharded_metadata", "state_dict", "tags", "tp_plan",
        "tp_size", "tqdm_class", "recursive", "softcap", "use_kernels", "variant", "weight_mapping", "weights_only",
    ),
    "settable by code alone; in a file transformers fails on them": (
        "use_return_dict", "allow_global_per_layer_attribute_access", "is_heterogeneous", "per_layer_attributes",
        "serialize_explicit_per_layer_config",
    ),
    "at the top level or in the vision tower: of the language tower, read there alone": ("tie_word_embeddings",),
}  # fmt: skip
"""Keys by the reason why any value gives the same model, or none."""

_OF_A_CONFIG = re.compile(r"(^|_)config$|^configuration$")
_LOOKS_UP = ("getattr", "hasattr", "setattr")
_TAKES = ("pop", "get", "setdefault")


def names_read(module: ModuleType) -> Iterator[str]:
    """Attributes of whatever is called a config, literals looked up in it, and keys taken from its arguments."""
    own = module in OF_CONFIGS

    def is_config(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Attribute) and node.func.attr == "get_text_config"
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return bool(_OF_A_CONFIG.search(name)) or (own and name == "self")

    def is_arguments(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in ("kwargs", "config_dict")

    for node in ast.walk(ast.parse(inspect.getsource(module))):
        match node:
            case ast.Attribute(value=value, attr=name) if is_config(value):
                yield name
            case ast.Call(func=ast.Name(id=function), args=[owner, ast.Constant(value=str(name)), *_]) if (
                function in _LOOKS_UP and is_config(owner)
            ):
                yield name
            case ast.Call(func=ast.Attribute(value=owner, attr=method), args=[ast.Constant(value=str(name)), *_]) if (
                method in _TAKES and is_arguments(owner)
            ):
                yield name
            case ast.Subscript(value=owner, slice=ast.Constant(value=str(name))) if is_arguments(owner):
                yield name
            case ast.Compare(left=ast.Constant(value=str(name)), comparators=[owner]) if is_arguments(owner):
                yield name


def all_names() -> set[str]:
    """Everything that transformers acts on; methods are none."""
    attributes = {name: inspect.getattr_static(kind, name) for kind in ALL for name in dir(kind)}
    methods = {
        name for name, value in attributes.items() if callable(value) or isinstance(value, classmethod | staticmethod)
    }
    found = {name for name in attributes if not name.startswith("__")}
    found |= {name for kind in ALL for name in (*(f.name for f in dataclasses.fields(kind)), *kind.attribute_map)}
    for module in (*OF_CONFIGS, *OF_MODELS):
        found |= set(names_read(module))
    return {name for name in found - methods if not name.startswith("_abc_")}


@pytest.fixture(scope="module")
def ours() -> dict[str, set[str]]:
    """Keys by the object that they are read in or refused in, told by the reader itself."""
    told: dict[str, set[str]] = {"top": set(), "text_config": set(), "vision_config": set()}

    class Telling(Section):
        def __init__(self, values: Any, where: str) -> None:
            super().__init__(values, where)
            self.read = told[where.rpartition(": ")[2] if ": " in where else "top"] if "rope" not in where else set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_vl, "Section", Telling)
        for name in ("4B", "30B-A3B"):
            Qwen3VLShape.from_dict(hf_config(preset(name)))
    for section, own in (
        ("top", qwen3_vl_keys.TOP),
        ("text_config", qwen3_vl_keys.TEXT),
        ("vision_config", qwen3_vl_keys.VISION),
    ):
        told[section] |= {*qwen3_vl_keys.ANYWHERE, *own}
    return told


def test_every_key_that_transformers_acts_on_is_accounted_for(ours: dict[str, set[str]]) -> None:
    listed = {name for names in CHANGES_NOTHING.values() for name in names}
    known = listed | set().union(*ours.values()) | set(GenerationConfig().to_dict())
    assert sorted(all_names() - known) == []


def test_every_field_of_every_class_is_accounted_for_where_it_stands(ours: dict[str, set[str]]) -> None:
    """Claim: one that the language tower reads is no excuse for the vision tower."""
    listed = {name for names in CHANGES_NOTHING.values() for name in names}
    for section, kinds in CLASSES.items():
        for kind in kinds:
            fields = {name for field in dataclasses.fields(kind) for name in (field.name,)} | set(kind.attribute_map)
            assert sorted(fields - listed - ours[section]) == [], kind


def test_the_walk_finds_what_changes_a_model() -> None:
    """Claim: keys that were once overlooked are among the names, so that the list above means something."""
    overlooked = {"rope_scaling", "rope_theta", "partial_rotary_factor", "is_causal", "layer_types", "sliding_window"}
    overlooked |= {"configuration_files", "transformers_weights", "fusion_config", "per_layer_config", "attribute_map"}
    assert overlooked <= all_names()


def test_nothing_is_listed_that_transformers_does_not_know() -> None:
    """Claim: a reason stands for a key that is there; one that a newer transformers gives up is taken out."""
    gone = {name for names in CHANGES_NOTHING.values() for name in names} - all_names()
    assert sorted(gone - {"auto_map", "initializer_range"}) == []
