"""Preference pairs from a file: every malformed line is refused by file, line and field; what is read is judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.data.pairs import PairSource, read_pairs
from prism_megatron.data.records import Part
from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import response_text
from prism_megatron.errors import DataError

WHOLE, CAPTION = response_text("a cat", "It is a cat.", "cat"), "<caption>\na cat\n</caption>"
GOOD: dict[str, Any] = {
    "id": "p-1",
    "image": "images/1.png",
    "question": "What is it?",
    "chosen": WHOLE,
    "rejected": [response_text("a dog", "It is a dog.", "dog"), response_text("?", "?", "?")],
    "source": "made",
}


def make_file(folder: Path, *lines: dict[str, Any] | str) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 32)).save(folder / "images" / "1.png")
    path = folder / "pairs.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def source(path: Path, renderer: Renderer, *, part: Part = "train", batch_size: int = 2, share: float = 0.0,
           max_response_tokens: int = 200) -> PairSource:  # fmt: skip
    return PairSource(path, renderer, part=part, seed=0, batch_size=batch_size, max_prompt_tokens=200,
                      max_response_tokens=max_response_tokens, validation_share=share)  # fmt: skip


def test_lines_become_groups(tmp_path: Path, renderer: Renderer) -> None:
    """Claim: the chosen response is the reference and every rejected one a pair; a caption alone judges perception."""
    path = make_file(tmp_path, GOOD, {**GOOD, "id": "p-2", "chosen": CAPTION, "rejected": [CAPTION, WHOLE]})
    pairs = source(path, renderer)
    assert pairs.counts.to_plain() == {"lines": 2, "kept": 2, "pairs": 4, "long_rejected_responses": 0}
    whole, caption = sorted(pairs.batch(0), key=lambda group: group.prompt.id)
    assert whole.reference == renderer.response("a cat", "It is a cat.", "cat")
    assert (whole.towers, whole.valid_rollouts) == ((0, 1), (0, 1))
    assert whole.prompt.question == "What is it?" and len(whole.prompt.images) == 1
    assert (caption.towers, caption.valid_rollouts) == ((0,), (0, 1))
    assert caption.reference == renderer.caption_alone("a cat")


def test_epochs_are_permutations_and_lines_of_one_id_are_held_out_together(tmp_path: Path, renderer: Renderer) -> None:
    path = make_file(tmp_path, *({**GOOD, "id": f"p-{i // 2}"} for i in range(40)))
    train, held_out = (source(path, renderer, part=part, share=0.3) for part in ("train", "validation"))
    assert train.counts.kept + held_out.counts.kept == 40
    ids = [{one.group(i).prompt.id for i in range(one.counts.kept)} for one in (train, held_out)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    lines = train.counts.kept
    epochs = [[train.group(e * lines + i).prompt.id for i in range(lines)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_what_is_too_long_is_left_out_and_counted(tmp_path: Path, renderer: Renderer) -> None:
    long = response_text("long " * 100, "b", "c")
    lines = [
        {**GOOD, "rejected": [WHOLE, long]},
        {**GOOD, "chosen": long},
        {**GOOD, "rejected": [long]},
        {**GOOD, "question": "long " * 200},
    ]
    pairs = source(make_file(tmp_path, *lines), renderer)
    assert pairs.counts.to_plain() == {
        "lines": 4, "kept": 1, "long_prompt": 1, "long_response": 2, "pairs": 1, "long_rejected_responses": 1
    }  # fmt: skip
    with pytest.raises(DataError, match=r"no line is left to use: 1 of 3 is with a prompt of more than 200 tokens"):
        source(make_file(tmp_path, *lines[1:]), renderer)


def test_a_response_as_long_as_the_bound_is_used(tmp_path: Path, renderer: Renderer) -> None:
    """The chosen and the rejected one alike; with one token less there is no pair."""
    path = make_file(tmp_path, {**GOOD, "rejected": [WHOLE]})
    bound = len(renderer.written(WHOLE, id="x").token_ids)
    assert source(path, renderer, max_response_tokens=bound).counts.also["pairs"] == 1
    with pytest.raises(DataError, match="1 of 1 is with a reference of more than"):
        source(path, renderer, max_response_tokens=bound - 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": 3}, "id"),
        ({"id": " "}, "id"),
        ({"question": ""}, "question"),
        ({"question": "\ud800"}, "question"),
        ({"chosen": None}, "chosen"),
        ({"chosen": {"caption": "a"}}, "chosen"),
        ({"rejected": WHOLE}, "rejected"),
        ({"rejected": []}, "rejected"),
        ({"rejected": [WHOLE, None]}, "rejected"),
        ({"rejected": [[WHOLE]]}, "rejected"),
        ({"source": ["x"]}, "source"),
        ({"source": "mathvision/testmini"}, "source"),
        ({"score": 1}, "score"),
        ({"image": "images/none.png"}, "image"),
        ({"image": "/etc/hostname"}, "image"),
        ({"image": "images/../../outside.png"}, "image"),
        ({"image": "images/link.png"}, "image"),
        ({"image": "images"}, "image"),
        ({"image": "images/1.png\0"}, "image"),
    ],
)
def test_a_malformed_field_is_named(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = make_file(tmp_path / "set", GOOD, {**GOOD, **change})
    shutil.copy(path.parent / "images" / "1.png", tmp_path / "outside.png")
    (path.parent / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: field {field}: "):
        read_pairs(path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"chosen": "a cat"}, "chosen: not a valid response"),
        ({"chosen": WHOLE + "!"}, "chosen: not a valid response: text after"),
        ({"chosen": "<caption>a</caption><think>b</think>"}, "chosen: not a valid response"),
        ({"rejected": ["<think>b</think><answer>c</answer>"]}, "rejected: not a valid response"),
        ({"rejected": [WHOLE, CAPTION]}, "rejected: a caption alone, where the chosen response has reasoning too"),
        ({"rejected": [WHOLE.replace("cat", "<|im_end|>")]}, "rejected: the text holds '<|im_end|>'"),
        ({"question": "<|vision_start|>"}, "question: the text holds"),
    ],
)
def test_a_response_that_cannot_be_judged_is_named(
    change: dict[str, Any], field: str, tmp_path: Path, renderer: Renderer
) -> None:
    with pytest.raises(DataError) as error:
        source(make_file(tmp_path, GOOD, {**GOOD, **change}), renderer)
    assert f"pairs.jsonl:2: field {field}" in str(error.value)


@pytest.mark.parametrize("line", ["{", "[1]", "null", '{"id": 1}', "[" * 100_000])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: "):
        read_pairs(make_file(tmp_path, GOOD, line))


def test_missing_and_empty_files_and_evaluation_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no file; --pairs names"):
        read_pairs(tmp_path)
    with pytest.raises(DataError, match="holds no pairs"):
        read_pairs(make_file(tmp_path / "a", ""))
    with pytest.raises(DataError, match="evaluation only"):
        read_pairs(make_file(tmp_path / "mathvision_testmini", GOOD))
