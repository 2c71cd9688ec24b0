"""Rendering: layout, masks, and text that must not be taken for control tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from prism_megatron.config.stages.data import STRUCTURED_SYSTEM_PROMPT
from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import response_text
from prism_megatron.data.tokenizer import CONTROL_TOKENS, MARKUP_TOKENS
from prism_megatron.errors import DataError

PICTURE = Image.new("RGB", (96, 64))


def test_a_prompt_holds_each_image_pad_once_per_merged_patch(renderer: Renderer) -> None:
    prompt = renderer.prompt("p", "What?", [PICTURE, Image.new("RGB", (32, 32))])
    assert renderer.decode(prompt.token_ids) == (
        "<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "What?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [image.grid_thw for image in prompt.images] == [(1, 4, 6), (1, 2, 2)]
    assert np.allclose(prompt.images[0].pixel_values_P_D, -1.0)
    assert renderer.num_prompt_tokens("p", "What?", [(96, 64), (32, 32)]) == len(prompt.token_ids)


def test_a_system_prompt_comes_first(mini_folder: Path) -> None:
    prompt = Renderer.from_folder(mini_folder, system_prompt="Be brief.").prompt("p", "What?", [])
    assert Renderer.from_folder(mini_folder).decode(prompt.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_training_row_marks_the_response_and_its_end(renderer: Renderer) -> None:
    """Claim: masked tokens are exactly the response's, the end token included; the row shares the prompt's images."""
    prompt = renderer.prompt("p", "What?", [PICTURE])
    response = renderer.response("a", "b", "c")
    row, mask = renderer.training_row(prompt, response)
    assert len(mask) == len(row.token_ids)
    assert tuple(token for token, weight in zip(row.token_ids, mask, strict=True) if weight) == response.token_ids
    assert set(mask) == {0.0, 1.0} and response.token_ids[-1] == renderer.end_token_id
    assert row.images[0] is prompt.images[0]


def test_segments_of_a_reference_end_at_its_tags(renderer: Renderer) -> None:
    response = renderer.response("- red circle: 2", "red circle: 2", "2")
    perception, reasoning = response.segments.perception, response.segments.reasoning
    assert perception is not None and reasoning is not None
    text = renderer.decode(response.token_ids[perception.start : perception.end])
    assert text.strip() == "<caption>\n- red circle: 2\n</caption>"
    text = renderer.decode(response.token_ids[reasoning.start : reasoning.end])
    assert text.strip() == "<think>\nred circle: 2\n</think>\n<answer>2</answer>"


def test_equal_text_gives_equal_ids(renderer: Renderer) -> None:
    """Claim: a rollout that spells the reference's text token by token is the reference (docs/method.md, section 3)."""
    reference = renderer.response("a", "b", "c")
    again = renderer.tokenizer(renderer.decode(reference.token_ids))["input_ids"]
    assert tuple(again) == reference.token_ids
    assert renderer.segment_finder.find(again) == reference.segments


def test_a_caption_alone_has_the_tokens_of_a_whole_response(renderer: Renderer) -> None:
    """Claim: without reasoning a reference is the start of a whole one, to the token in which its caption ends.

    The mini's tokenizer joins ``>`` and the line end after it, so a caption encoded by itself would differ there.
    """
    whole, alone = renderer.response("a", "b", "c"), renderer.caption_alone("a")
    caption = whole.segments.perception
    assert caption is not None
    assert alone.token_ids == (*whole.token_ids[: caption.end], renderer.end_token_id)
    assert (alone.segments.perception, alone.segments.reasoning, alone.segments.valid) == (caption, None, True)
    assert renderer.written("<caption>\na\n</caption>", id="x") == alone
    assert renderer.written("<caption>\na\n</caption>\n \n", id="x") == alone


def test_a_written_response_is_taken_as_it_stands(renderer: Renderer) -> None:
    """Claim: the text decodes again to itself, ``<thought>`` as ``<think>``; tokens hidden in bodies are refused."""
    text = " <caption>a</caption><thought>b</thought>\n\n<answer> c</answer>\n"
    response = renderer.written(text, id="x")
    assert renderer.decode(response.token_ids[:-1]) == text.replace("thought", "think")
    assert response.segments == renderer.segment_finder.find(response.token_ids)
    for bad in ("", "a", "<caption></caption>", "<caption>a</caption><think>b</think>", text + "!"):
        with pytest.raises(DataError, match="x: not a valid response"):
            renderer.written(bad, id="x")
    with pytest.raises(DataError, match="x: the text holds"):
        renderer.written(text.replace("b", "<|im_end|>"), id="x")


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, *MARKUP_TOKENS])
def test_added_tokens_in_text_are_refused_by_name(token: str, renderer: Renderer) -> None:
    with pytest.raises(DataError, match="record-7: the text holds"):
        renderer.prompt("record-7", f"x{token}system", [])
    for bodies in ((token, "b", "c"), ("a", token, "c"), ("a", "b", token)):
        with pytest.raises(DataError, match="record-7: the text holds"):
            renderer.response(*bodies, id="record-7")


def test_almost_tokens_stay_text(renderer: Renderer) -> None:
    question = "<|im_start|<|im_end| <image1> <|IM_START|>"
    prompt = renderer.prompt("p", question, [])
    assert sum(token in renderer.control_token_ids for token in prompt.token_ids) == 2  # the roles' im_start
    assert question in renderer.decode(prompt.token_ids)


@pytest.mark.parametrize("bodies", [("", "b", "c"), ("a", "b</think>", "c"), ("a", "b", "<answer>"), ("a", " ", "c")])
def test_an_invalid_reference_is_refused(bodies: tuple[str, str, str], renderer: Renderer) -> None:
    with pytest.raises(DataError, match="record-7"):
        renderer.response(*bodies, id="record-7")


def test_an_impossible_image_is_refused_by_name(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="record-7: an image of 500x1"):
        renderer.prompt("record-7", "What?", [Image.new("RGB", (500, 1))])
    with pytest.raises(DataError, match="record-7: an image of 500x1"):
        renderer.num_prompt_tokens("record-7", "What?", [(500, 1)])


def test_the_released_format_is_taken_where_it_is_asked_for(mini_folder: Path, renderer: Renderer) -> None:
    """A caption with a tag inside, valid under the lax rule only."""
    text = "<caption>a</caption> b</caption><think>c</think><answer>d</answer>"
    assert Renderer.from_folder(mini_folder, strict_format=False).written(text, id="x").segments.valid
    with pytest.raises(DataError, match="x: not a valid response"):
        renderer.written(text, id="x")


def test_control_tokens_exclude_the_end_token(renderer: Renderer) -> None:
    assert renderer.image_token_id in renderer.control_token_ids
    assert renderer.pad_token_id in renderer.control_token_ids
    assert renderer.end_token_id not in renderer.control_token_ids


def test_a_folder_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        Renderer.from_folder(tmp_path)


@pytest.mark.parametrize("body", ["caption", "think", "answer"])
def test_no_body_of_a_written_response_holds_added_tokens(body: str, mini_folder: Path) -> None:
    """Claim: an image's place inside any body is text that is read as another token, and is refused."""
    bodies = {"caption": "a", "think": "b", "answer": "c"} | {body: "<|image_pad|>"}
    text = "\n".join(f"<{tag}>\n{inner}\n</{tag}>" for tag, inner in bodies.items())
    with pytest.raises(DataError, match=r"x: .*image_pad"):
        Renderer.from_folder(mini_folder).written(text, id="x")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<tool_call>"])
def test_added_tokens_in_a_system_prompt_are_refused(token: str, mini_folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        Renderer.from_folder(mini_folder, system_prompt=f"You see {token}")
    assert str(caught.value).startswith(f"--system-prompt: the text holds {token!r}, which the tokenizer would take")


def test_a_system_prompt_may_explain_the_tags(mini_folder: Path) -> None:
    """Claim: the default one does, and ``<think>`` in it is an added token."""
    renderer = Renderer.from_folder(mini_folder, system_prompt=STRUCTURED_SYSTEM_PROMPT)
    assert "<think>" in renderer.decode(renderer.prompt("p", "Which?", []).token_ids)


def test_tokens_that_a_tokenizer_was_given_later_are_refused_too(mini_folder: Path, tmp_path: Path) -> None:
    """Claim: the list is the tokenizer's own, by every door."""
    tokenizer = AutoTokenizer.from_pretrained(mini_folder)
    tokenizer.add_tokens(["<point>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[MASK]"]})
    shutil.copytree(mini_folder, tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    renderer = Renderer.from_folder(tmp_path / "more")
    for token in ("<point>", "[MASK]"):
        for use in (
            lambda token=token: Renderer.from_folder(tmp_path / "more", system_prompt=token),
            lambda token=token: renderer.prompt("p", f"a {token}", []),
            lambda token=token: renderer.response("a", "b", token),
            lambda token=token: renderer.written(response_text(token, "b", "c"), id="p"),
            lambda token=token: renderer.caption_alone(token),
        ):
            with pytest.raises(DataError, match="the text holds"):
                use()


def test_a_template_with_other_places_for_images_is_refused(mini_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(mini_folder, tmp_path / "other")
    template = (mini_folder / "chat_template.jinja").read_text()
    (tmp_path / "other" / "chat_template.jinja").write_text("<|image_pad|>" + template)
    renderer = Renderer.from_folder(tmp_path / "other")
    with pytest.raises(DataError, match=r"the chat template of .* makes 2 places for 1 images"):
        renderer.prompt("p", "Which?", [Image.new("RGB", (32, 32))])
