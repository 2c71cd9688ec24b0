"""Tokenizer, chat template and image settings are read in every form that they are saved in, and must agree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.conversion.hf.writer import read_companions
from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.data.reading.model_files import chat_template, check_model_files, image_settings, tokens
from prism_megatron.data.render import Renderer
from prism_megatron.errors import DataError
from prism_megatron.game.same_inputs import check_same_inputs

POLICY = MINI_FOLDER / "policy"
SHAPE = Qwen3VLShape.from_folder(POLICY)
SETTINGS: dict[str, Any] = json.loads((POLICY / "preprocessor_config.json").read_text())
TEMPLATE = (POLICY / "chat_template.jinja").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The mini's policy without its weights."""
    return Path(shutil.copytree(POLICY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def write(folder: Path, name: str, document: Any) -> None:
    (folder / name).write_text(json.dumps(document))


def nest(folder: Path, **changes: Any) -> None:
    """As transformers 5 saves a processor."""
    video = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "video_processor_type": "Qwen3VLVideoProcessor"}
    nested = {"image_processor": SETTINGS | changes, "video_processor": video, "processor_class": "Qwen3VLProcessor"}
    write(folder, "processor_config.json", nested)


def in_tokenizer_config(folder: Path, template: Any) -> None:
    document = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, "tokenizer_config.json", document | {"chat_template": template})


def test_what_transformers_5_saves_is_read_as_what_was_published(folder: Path) -> None:
    """Claim: pixel for pixel; everything that reads image settings takes the folder, and so does transformers."""
    nest(folder)
    (folder / "preprocessor_config.json").unlink()
    image = Image.effect_noise((70, 50), 64).convert("RGB")
    found, expected = (ImagePreprocessor.from_folder(place)(image) for place in (folder, POLICY))
    assert np.array_equal(found.pixel_values_P_D, expected.pixel_values_P_D)
    check_model_files(folder, SHAPE)
    check_same_inputs(POLICY, folder, where="judge")
    check_same_inputs(folder, POLICY, where="judge")
    assert Renderer.from_folder(folder).prompt("p", "What?", [image]).token_ids


def test_older_readers_get_the_older_forms(folder: Path, tmp_path: Path) -> None:
    """Claim: what converters write of a folder in new forms alone has the old ones, with which transformers reads the
    same settings; of a folder that has them, nothing is added."""
    assert sorted(read_companions(folder)) == sorted(path.name for path in folder.iterdir())
    nest(folder, patch_size=16)
    (folder / "preprocessor_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    write(folder, "chat_template.json", {"chat_template": TEMPLATE})
    written = tmp_path / "written"
    written.mkdir()
    for name, content in read_companions(folder).items():
        (written / name).write_bytes(content)
    (written / "processor_config.json").unlink()
    (written / "chat_template.json").unlink()
    assert image_settings(written) == image_settings(POLICY)
    assert chat_template(written) == TEMPLATE
    assert json.loads((written / "video_preprocessor_config.json").read_text())["size"]["shortest_edge"] == 4096
    load: Any = AutoImageProcessor.from_pretrained  # has no type hints
    assert load(written, local_files_only=True, backend="pil").to_dict()["size"] == SETTINGS["size"]


def test_the_case_of_a_bug_report_is_read(shared_dir: Path, tmp_path: Path) -> None:
    shutil.copyfile(shared_dir / "cases" / "processor_config.json", tmp_path / "processor_config.json")
    assert image_settings(tmp_path) == image_settings(shared_dir / "qwen3_vl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"resample": 3}, ""),
        ({"image_processor_type": "Qwen2VLImageProcessor", "do_resize": True}, ""),
        ({"size": None, "min_pixels": 32 * 32, "max_pixels": 128 * 128}, ""),
        ({"min_pixels": 32 * 32}, ""),
        (
            {"image_mean": [0.4, 0.5, 0.5]},
            "image_mean is .* in processor_config.json and .* in preprocessor_config.json",
        ),
        ({"size": {"shortest_edge": 1, "longest_edge": 128 * 128}}, "size is .* remove the wrong file"),
        ({"resample": 2}, "resample is 2 in processor_config.json and 3 in preprocessor_config.json"),
        ({"min_pixels": 5}, "shortest_edge of size and min_pixels are names of one setting, and are .1024, 5"),
        ({"size": {"longest_edge": 5}}, "expected shortest_edge and longest_edge"),
        ({"size": {"height": 5, "width": 5}}, "expected shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": "1", "longest_edge": 5}}, "expected a number of pixels"),
        ({"patch_size": None}, "patch_size missing"),
        ({"patch_size": "16"}, "patch_size is '16', expected a whole number"),
        ({"image_std": [0.5]}, "image_std is .*, expected a number for each of three colours"),
        ({"image_std": [0.5, 0, 0.5]}, "it cannot be 0"),
        ({"resample": "cubic"}, "resample is 'cubic', expected the number"),
        ({"rescale_factor": 0}, "rescale_factor is 0, expected a positive number"),
        ({"preprocess": 5, "device": "cuda"}, ""),
        ({"do_resize": False}, "do_resize is False, and only true is supported"),
        ({"image_processor_type": "SiglipImageProcessor"}, "'SiglipImageProcessor', which is not Qwen3-VL's"),
    ],
)
def test_two_forms_of_the_image_settings_have_to_agree(changes: dict[str, Any], message: str, folder: Path) -> None:
    """Claim: with an empty message both are read as the one, old names of areas included."""
    nest(folder, **changes)
    if message:
        with pytest.raises(DataError, match=message):
            image_settings(folder)
    else:
        assert image_settings(folder) == image_settings(POLICY)


@pytest.mark.parametrize(
    "put",
    [
        lambda folder: write(folder, "chat_template.json", {"chat_template": TEMPLATE}),
        lambda folder: write(folder, "processor_config.json", {"chat_template": TEMPLATE}),
        lambda folder: in_tokenizer_config(folder, TEMPLATE),
        lambda folder: in_tokenizer_config(
            folder, [{"name": "tools", "template": "{{ 1 }}"}, {"name": "default", "template": TEMPLATE}]
        ),
    ],
)
def test_a_chat_template_is_read_in_any_form(put: Callable[[Path], None], folder: Path) -> None:
    """Claim: alone, and beside the newest form; prompts are the same tokens."""
    expected = Renderer.from_folder(POLICY).prompt("p", "What?", []).token_ids
    put(folder)
    assert Renderer.from_folder(folder).prompt("p", "What?", []).token_ids == expected
    (folder / "chat_template.jinja").unlink()
    assert Renderer.from_folder(folder).prompt("p", "What?", []).token_ids == expected
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(DataError, match=r"the chat templates in chat_template.jinja and .*_.*json differ"):
        chat_template(folder)


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / name).read_text())
    edit(document)
    write(folder, name, document)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer.json does not exist; copy it"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), r"chat_template.jinja does not exist, and neither"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            r"preprocessor_config.json does not exist, nor",
        ),
        (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja cannot be read"),
        (lambda folder: write(folder, "processor_config.json", [1]), "processor_config.json holds list"),
        (
            lambda folder: write(folder, "processor_config.json", {"image_processor": 1}),
            "image_processor is 1, expected",
        ),
        (
            lambda folder: write(folder, "tokenizer.json", {"model": {"vocab": {}}, "added_tokens": []}),
            "tokenizer.json is no tokenizer of a Qwen3-VL",
        ),
        (
            lambda folder: write(folder, "tokenizer.json", {"model": {"vocab": {"a": "1"}}, "added_tokens": []}),
            "tokenizer.json is no tokenizer of a Qwen3-VL",
        ),
        (
            lambda folder: change(folder, "preprocessor_config.json", lambda found: found.update(patch_size=14)),
            "cut with patch_size 14, but vision_config of config.json says 16",
        ),
        (
            lambda folder: change(folder, "preprocessor_config.json", lambda found: found.update(merge_size=1)),
            "cut with merge_size 1, but vision_config of config.json says 2",
        ),
        (
            lambda folder: change(folder, "tokenizer.json", lambda found: found["added_tokens"][-1].update(id=512)),
            "has the token 512, but vocab_size of config.json is 512",
        ),
        (
            lambda folder: change(
                folder,
                "tokenizer.json",
                lambda found: (
                    [token.update(content=f"<|{token['id']}|>") for token in found["added_tokens"]]
                    and found["added_tokens"][0].update(content="<|image_pad|>")
                ),
            ),
            r"image_token_id of config.json is 498, but <.image_pad.> is 486 in tokenizer.json",
        ),
    ],
)
def test_a_folder_that_makes_no_inputs_for_its_model_is_refused(
    damage: Callable[[Path], None], message: str, folder: Path
) -> None:
    check_model_files(folder, SHAPE)
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        check_model_files(folder, SHAPE)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_tokenizer_without_a_token_that_every_row_needs_is_refused(token: str, folder: Path) -> None:
    change(folder, "tokenizer_config.json", lambda found: found.pop(token))
    change(folder, "special_tokens_map.json", lambda found: found.pop(token))
    with pytest.raises(DataError, match=f"tokenizer_config.json names no {token}"):
        Renderer.from_folder(folder)


def test_tokens_are_those_of_the_tokenizer() -> None:
    found = tokens(POLICY)
    assert found == {number: Renderer.from_folder(POLICY).tokenizer.convert_ids_to_tokens(number) for number in found}
