"""Whatever is done to the files of a model: the same model as transformers' or a refusal, never another model."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest

from prism_megatron.commands import verify as command
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.tools.convert import ToMegatronConfig
from prism_megatron.config.tools.verify import VerifyConfig
from prism_megatron.conversion.hf.transformers_config import transformers_config
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.jobs.convert import to_megatron
from prism_megatron.parity.verify import verify
from prism_megatron.testing import GlooWorld
from tests.config_edits import bases, edited, write_base, write_edited
from tests.conftest import SEED

NUM_EDITS = 44
NUM_CONFIGS = 600
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@pytest.fixture
def published(request: pytest.FixtureRequest) -> Path | None:
    """Where the published configs are; None where they are not, and those of the presets stand for them."""
    with suppress(pytest.skip.Exception):
        shared: Path = request.getfixturevalue("shared_dir")
        return shared
    return None


Verdict = Literal["same", "refused", "another model"]


def judge(world: World, folder: Path) -> tuple[Verdict, str]:
    """What ``prism-verify`` says of a folder. Whatever else is raised fails the test with its traceback."""
    try:
        report = verify(world, command.checked(VerifyConfig(hf=str(folder))))
    except PrismError as error:
        return "refused", str(error)
    assert report is not None
    return ("same" if report.ok else "another model"), report.text()


def converts(folder: Path, save: Path) -> tuple[Verdict, str]:
    """What ``prism-convert to-megatron`` says of a folder."""
    try:
        to_megatron(ToMegatronConfig(hf=str(folder), save=str(save)), say=lambda _line: None)
    except PrismError as error:
        return "refused", str(error)
    return "same", ""


def as_read(config: Any) -> dict[str, Any]:
    """What transformers' class made of a config, by our names; sizes that no weight shows are among them."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    read = {
        "kind": config.model_type,
        "tied": config.tie_word_embeddings,
        "special": [getattr(config, name) for name in SPECIAL],
        "text": [text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.num_attention_heads,
                 text.num_key_value_heads, text.head_dim, text.vocab_size, text.rms_norm_eps],
        "positions": [rope["rope_type"], rope["rope_theta"], rope["mrope_section"]],
        "vision": [vision.depth, vision.hidden_size, vision.num_heads, vision.intermediate_size, vision.patch_size,
                   vision.temporal_patch_size, vision.in_channels, vision.spatial_merge_size,
                   vision.num_position_embeddings, vision.out_hidden_size, list(vision.deepstack_visual_indexes)],
        "angles": [vision.rope_parameters["rope_type"], vision.rope_parameters["rope_theta"],
                   getattr(vision, "head_dim", None) or vision.hidden_size // vision.num_heads],
        "fixed": [text.hidden_act, vision.hidden_act, text.attention_bias, getattr(text, "is_causal", True)],
    }  # fmt: skip
    if config.model_type == "qwen3_vl_moe":
        read["experts"] = [text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size,
                           text.decoder_sparse_step, text.mlp_only_layers]  # fmt: skip
    return read


def as_ours(shape: Qwen3VLShape) -> dict[str, Any]:
    """The same of our shape, with what our model always computes."""
    text, vision = shape.text, shape.vision
    read: dict[str, Any] = {
        "kind": shape.model_type,
        "tied": text.tied,
        "special": [getattr(shape, name) for name in SPECIAL],
        "text": [text.num_layers, text.hidden, text.ffn, text.heads,
                 text.kv_heads, text.head_dim, text.vocab, text.eps],
        "positions": ["default", text.theta, list(text.mrope_section)],
        "vision": [vision.depth, vision.hidden, vision.heads, vision.ffn, vision.patch, vision.temporal_patch,
                   vision.channels, vision.merge, vision.num_position_embeddings, vision.out_hidden, list(vision.taps)],
        "angles": ["axial", 10000.0, vision.head_dim],
        "fixed": ["silu", "gelu_pytorch_tanh", False, True],
    }  # fmt: skip
    if text.experts is not None:
        read["experts"] = [text.num_experts, text.experts_per_token, text.expert_ffn, 1, []]
    return read


def test_random_configs_are_read_as_transformers_reads_them(tmp_path: Path, published: Path | None) -> None:
    """Claim: whatever is not refused has every size and setting that transformers' class takes from it.

    Blind spot: what transformers' model does with a setting that this list does not have; the test below sees it.
    """
    configs, chance = bases(published), random.Random(SEED)
    accepted = 0
    for number in range(NUM_CONFIGS):
        name, config = list(configs.items())[number % len(configs)]
        changed, said = edited(config, chance)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            shape, theirs = Qwen3VLShape.from_folder(tmp_path), transformers_config(tmp_path)
        except PrismError:
            continue
        assert as_ours(shape) == as_read(theirs), f"{name}: {said}"
        accepted += 1
    assert NUM_CONFIGS / 10 < accepted < NUM_CONFIGS


def test_a_pad_token_that_occurs_in_texts_is_trained_as_any_other(tmp_path: Path) -> None:
    """Claim: many fine-tuned models name the end of a turn, which prompts hold. torch's embedding would give its row no
    gradient, and the comparison would call the models different."""
    config = bases(None)["tiny"]
    config["text_config"]["pad_token_id"] = config["text_config"]["eos_token_id"]
    write_base(tmp_path / "model", config)
    with GlooWorld(1) as gloo:
        ((verdict, told),) = gloo.run(judge, tmp_path / "model")
    assert verdict == "same", told


@pytest.mark.long
def test_random_edits_give_the_same_model_or_a_refusal(tmp_path: Path, published: Path | None) -> None:
    """Claim: of edits of the six published configs and of tiny ones, in both spellings, every folder that converts is
    the same model (logits and gradients); whatever convert refuses, verify refuses in the same words. Some of each are
    met.
    """
    configs = bases(published)
    for number, config in enumerate(configs.values()):
        write_base(tmp_path / f"base-{number}", config)
    chance, met = random.Random(SEED), set()
    with GlooWorld(1) as gloo:
        for edit in range(NUM_EDITS):
            number = edit % len(configs)
            name, config = list(configs.items())[number]
            changed, said = edited(config, chance)
            folder, save = tmp_path / "edited", tmp_path / "checkpoint"
            write_edited(tmp_path / f"base-{number}", folder, changed)
            converted, why = converts(folder, save)
            ((verdict, told),) = gloo.run(judge, folder)
            what = f"{name}: {said}"
            assert verdict in ("same", "refused"), f"{what}: {told}"
            assert "\n" not in (told if verdict == "refused" else ""), what
            assert converted == verdict, f"{what}: {why}, but {told}"
            assert verdict == "same" or why == told, f"{what}: {why}, but {told}"
            met.add(verdict)
            shutil.rmtree(folder)
            shutil.rmtree(save, ignore_errors=True)
    assert met == {"same", "refused"}
