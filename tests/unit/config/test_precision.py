"""FP8 flags that contradict one another, the model or the layout are refused by name; lengths fit FP8's blocks.

Oracle: Megatron's own align sizes and limits, written out. Blind spot: whether the kernels agree needs a GPU.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from prism_megatron.commands.align import parse
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig, check_precision
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.experiments.mini_world import mini_model_config
from prism_megatron.config.merge import merge
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.validate import check_align
from prism_megatron.errors import ConfigError

TOKENS = ("<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SHAPE = Qwen3VLShape.from_dict(
    mini_model_config(vocab_size=512, token_ids={token: index for index, token in enumerate(TOKENS)})
)
"""4 layers, hidden 128, MLP 160, 8 heads and 4 key/value heads of 16."""


def fp8(**fields: object) -> PrecisionConfig:
    return PrecisionConfig(fp8="hybrid", **fields)  # type: ignore[arg-type]


def test_the_flags_set_their_fields() -> None:
    flags = "--fp8 e4m3 --fp8-recipe mxfp8 --fp8-first-layers-bf16 1 --fp8-last-layers-bf16 2 --transformer-engine on"
    config = parse(f"{flags} --recompute selective --recompute-modules mlp core_attn --recompute-vision".split())
    assert config.precision == PrecisionConfig(
        transformer_engine="on", fp8="e4m3", fp8_recipe="mxfp8", fp8_first_layers_bf16=1, fp8_last_layers_bf16=2
    )
    assert config.recompute == RecomputeConfig("selective", ("mlp", "core_attn"), recompute_vision=True)


def test_a_list_in_a_file_is_checked_item_by_item() -> None:
    merged = merge(AlignConfig(), {"recompute": {"recompute_modules": ["mlp"]}})
    assert merged.recompute.recompute_modules == ("mlp",)
    for wrong, complaint in (("mlp", "must be a list"), (["mpl"], r"recompute_modules\[0\] must be one of core_attn")):
        with pytest.raises(ConfigError, match=complaint):
            merge(AlignConfig(), {"recompute": {"recompute_modules": wrong}})


@pytest.mark.parametrize(
    ("precision", "parallel", "dtype", "complaint"),
    [
        (fp8(), ParallelConfig(), "float32", "--fp8 hybrid works on bf16 parameters, not float32; use --dtype bf16"),
        (fp8(transformer_engine="off"), ParallelConfig(), "bf16", "--transformer-engine off; use auto or on"),
        (PrecisionConfig(fp8_last_layers_bf16=1), ParallelConfig(), "bf16", "--fp8-last-layers-bf16 1 has no meaning"),
        (
            fp8(fp8_recipe="delayed", fp8_first_layers_bf16=1),
            ParallelConfig(),
            "bf16",
            "--fp8-recipe delayed has all layers in FP8; use another recipe, or leave out --fp8-first-layers-bf16 1",
        ),
        (
            fp8(fp8_first_layers_bf16=2, fp8_last_layers_bf16=2),
            ParallelConfig(),
            "bf16",
            "--fp8-first-layers-bf16 2 --fp8-last-layers-bf16 2 leaves none of the 4 layers in FP8",
        ),
        (fp8(fp8_last_layers_bf16=2), ParallelConfig(pp=4), "bf16", "--fp8-last-layers-bf16 2 is more than Megatron"),
        (fp8(), ParallelConfig(tp=4), "bf16", "the MLP width of a rank is 40 at --tp 4; use a smaller --tp"),
        (PrecisionConfig(fp32_head=True), ParallelConfig(), "fp32", "--fp32-head is for a policy in bf16"),
        (fp8(fp8_recipe="mxfp8"), ParallelConfig(tp=2), "bf16", "--fp8-recipe mxfp8 multiplies matrices whose sides"),
    ],
)
def test_contradictions_are_refused(
    precision: PrecisionConfig, parallel: ParallelConfig, dtype: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        check_precision(precision, parallel, SHAPE, dtype=dtype)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_what_fits_is_let_through(recipe: str) -> None:
    check_precision(fp8(fp8_recipe=recipe), ParallelConfig(pp=4), SHAPE, dtype="bfloat16")
    check_precision(PrecisionConfig(), ParallelConfig(tp=4), SHAPE, dtype="float32")


def test_sides_and_layers_that_just_fit_are_let_through() -> None:
    """By hand: a stage of one layer all in bf16; an attention weight of (4 + 2·1)·8 = 48; experts that ep leaves whole.

    With one side fewer to a rank, or cut by tp, each of them would be no multiple of 16.
    """
    check_precision(fp8(fp8_last_layers_bf16=1), ParallelConfig(pp=4), SHAPE, dtype="bf16")
    narrow = replace(SHAPE, text=replace(SHAPE.text, heads=4, kv_heads=1, head_dim=8))
    check_precision(fp8(), ParallelConfig(), narrow, dtype="bf16")
    sparse = replace(SHAPE, text=replace(SHAPE.text, num_experts=4, experts_per_token=2, expert_ffn=16))
    check_precision(fp8(), ParallelConfig(tp=2, ep=2), sparse, dtype="bf16")
    with pytest.raises(ConfigError, match="the experts' width of a rank is 8 at --tp 2"):
        check_precision(fp8(), ParallelConfig(tp=2), sparse, dtype="bf16")


def test_either_end_stays_in_bf16_where_it_was_asked_for() -> None:
    """In the words of Megatron's ``TransformerConfig``; nothing is set without FP8."""
    for first, last in ((1, 2), (0, 1), (1, 0), (0, 0)):
        precision = fp8(fp8_recipe="blockwise", fp8_first_layers_bf16=first, fp8_last_layers_bf16=last)
        assert precision.transformer_settings() == {
            "fp8": "hybrid",
            "fp8_recipe": "blockwise",
            "first_last_layers_bf16": (first, last) != (0, 0),
            "num_layers_at_start_in_bf16": first,
            "num_layers_at_end_in_bf16": last,
        }
    assert PrecisionConfig().transformer_settings() == {}


def test_a_run_is_refused_before_any_process_starts() -> None:
    run = AlignConfig(precision=fp8(), model=ModelConfig(dtype="fp32"))
    with pytest.raises(ConfigError, match="--fp8 hybrid works on bf16 parameters, not fp32"):
        check_align(run, SHAPE, world_size=1)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("parallel", [ParallelConfig(tp=tp, cp=cp) for tp in (1, 2, 3) for cp in (1, 2, 3)])
def test_every_rank_has_whole_blocks_of_tokens(recipe: str, parallel: ParallelConfig) -> None:
    """Tokens of one row on one rank, after the cuts of context and sequence parallelism, and after the first alone."""
    block = 32 if recipe == "mxfp8" else 16
    length = fp8(fp8_recipe=recipe).length_multiple(parallel)
    assert length % parallel.length_multiple == 0, "the layouts themselves still divide it"
    assert length % (parallel.cp * parallel.tp) == 0
    assert length // parallel.cp % block == 0
    assert length // (parallel.cp * parallel.tp) % block == 0


def test_lengths_are_the_layouts_without_fp8() -> None:
    parallel = ParallelConfig(tp=2, cp=2)
    assert PrecisionConfig().length_multiple(parallel) == parallel.length_multiple == 8
