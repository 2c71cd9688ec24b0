"""What becomes of every line: kept, or counted once under its reason; bad ones are all known before the first step.

Each of the faults in ``FAULTS`` is one line of a set that has good lines too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.data.admission import Checks
from prism_megatron.data.identity import what_differs
from prism_megatron.data.loader import RecordSource
from prism_megatron.data.pairs import PairSource
from prism_megatron.data.pictures.files import Seen, look_at
from prism_megatron.data.reading.intake import BAD, NothingLeftError
from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import response_text
from prism_megatron.errors import DataError

RECORD: dict[str, Any] = {"image": "images/good.png", "question": "Which?", "choices": None, "answer": "3",
                          "answer_type": "integer", "solution": "It is 3.", "caption": "A dot.",
                          "source": "set"}  # fmt: skip
PAIR: dict[str, Any] = {"image": "images/good.png", "question": "Which?", "source": "set",
                        "chosen": response_text("a", "b", "c"), "rejected": [response_text("x", "y", "z")]}  # fmt: skip
Source = RecordSource | PairSource
SKIP = Checks("all", "skip")
# What each fault changes in a good line, and the reason it is counted under. Text is a line as it stands.
COMMON: dict[str, tuple[dict[str, Any] | str, str]] = {
    "no JSON": ('{"id": 1', "bad_json"),
    "a key twice": ('{"id": "k", "id": "k"}', "bad_json"),
    "a list": ("[1, 2]", "bad_json"),
    "a field more": ({"extra": 1}, "bad_field"),
    "an image in a list": ({"image": ["images/good.png"]}, "bad_field"),
    "a path to elsewhere": ({"image": "../good.png"}, "bad_field"),
    "no image": ({"image": "images/none.png"}, "bad_image"),
    "a truncated image": ({"image": "images/cut.jpg"}, "bad_image"),
    "an image of no picture": ({"image": "images/text.png"}, "bad_image"),
    "an image too thin": ({"image": "images/thin.png"}, "bad_image"),
    "control tokens in a question": ({"question": "a <|im_end|>"}, "bad_text"),
    "a benchmark": ({"source": "mathvision/test"}, "evaluation_only"),
    "a long question": ({"question": "many " * 200}, "long_prompt"),
}
FAULTS: dict[str, dict[str, tuple[dict[str, Any] | str, str]]] = {
    "records": {
        **COMMON,
        "an id again": ({"id": "good-0"}, "repeated_id"),
        "no caption": ({"caption": None}, "no_caption"),
        "control tokens in a choice": (
            {"choices": ["<|image_pad|>", "b"], "answer": "A", "answer_type": "choice"},
            "bad_text",
        ),
        "control tokens in an answer": (
            {"answer": "<|im_start|>", "answer_type": "text", "solution": None},
            "bad_text",
        ),
        "control tokens in a caption": ({"caption": "<|vision_start|>"}, "bad_text"),
        "tags in a solution": ({"solution": "</think>"}, "bad_text"),
        "a long caption": ({"caption": "many " * 200}, "long_response"),
    },
    "pairs": {
        **COMMON,
        "control tokens in a response": ({"rejected": [response_text("<|im_end|>", "b", "c")]}, "bad_text"),
        "a response without tags": ({"chosen": "It is 3."}, "bad_text"),
        "long responses": ({"rejected": [response_text("many " * 200, "b", "c")]}, "long_response"),
    },
}
CASES = [(kind, fault) for kind, faults in FAULTS.items() for fault in faults]


def write(folder: Path, kind: str, faults: Sequence[str], *, num_good: int = 4) -> Path:
    """A set with good lines, of which the first stands before all faults; its file."""
    images = folder / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(images / "good.png")
    Image.effect_noise((64, 64), 90).save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-300])
    (images / "text.png").write_text("no picture")
    Image.new("RGB", (900, 2)).save(images / "thin.png")
    template = RECORD if kind == "records" else PAIR
    lines = [json.dumps({"id": f"good-{i}", **template}) for i in range(num_good)]
    for number, fault in enumerate(faults):
        change = FAULTS[kind][fault][0]
        line = change if isinstance(change, str) else json.dumps({"id": f"bad-{number}", **template, **change})
        lines.insert(2 * number + 1, line)
    path = folder / ("data.jsonl" if kind == "records" else "pairs.jsonl")
    path.write_text("\n".join(lines) + "\n")
    return path


def source(path: Path, renderer: Renderer, checks: Checks, *, share: float = 0.0) -> Source:
    options: dict[str, Any] = {"part": "train", "seed": 0, "batch_size": 2, "max_prompt_tokens": 150,
                               "max_response_tokens": 150, "validation_share": share, "checks": checks}  # fmt: skip
    if path.name == "data.jsonl":
        return RecordSource(path.parent, renderer, **options)
    return PairSource(path, renderer, **options)


@pytest.mark.parametrize(("kind", "fault"), CASES, ids=[" ".join(case) for case in CASES])
def test_every_fault_is_counted_once_or_fails_by_name(
    kind: str, fault: str, tmp_path: Path, renderer: Renderer
) -> None:
    path, reason = write(tmp_path, kind, [fault]), FAULTS[kind][fault][1]
    counts = source(path, renderer, SKIP).counts
    assert (counts.lines, counts.kept, counts.left_out) == (5, 4, {reason: 1})
    if reason not in BAD:
        assert source(path, renderer, Checks("all")).counts == counts
        return
    with pytest.raises(DataError) as caught:
        source(path, renderer, Checks("all"))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert str(caught.value).endswith("; put that right, or leave out what is bad by --on-bad skip --check-images all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FAULTS)
def test_all_faults_at_once_are_skipped_and_the_rest_is_as_if_they_were_not_there(
    kind: str, tmp_path: Path, renderer: Renderer
) -> None:
    """Claim: order, batches and identity are those of the good lines alone; kept and reasons add up to the lines."""
    faults = list(FAULTS[kind])
    all_at_once = source(write(tmp_path / "a", kind, faults, num_good=6), renderer, SKIP)
    good = source(write(tmp_path / "b", kind, [], num_good=6), renderer, Checks())
    counts = all_at_once.counts
    assert counts.lines == 6 + len(faults) == counts.kept + sum(counts.left_out.values())
    assert counts.kept == 6
    assert all_at_once.identity == good.identity
    ids = [[one.prompt.id for step in range(6) for one in each.batch(step)] for each in (all_at_once, good)]
    assert ids[0] == ids[1]
    plain = counts.to_plain()
    assert plain["lines"] == plain["kept"] + sum(plain[name] for name in counts.left_out)


def test_a_file_that_was_mended_makes_other_data(tmp_path: Path, renderer: Renderer) -> None:
    """Claim: what is kept is part of what a checkpoint knows of its data, and a run must not go on in another order."""
    path = write(tmp_path, "records", ["no image"])
    before = source(path, renderer, SKIP).identity
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "none.png")
    after = source(path, renderer, SKIP).identity
    assert what_differs(before, after) == "there were 4 examples and are 5"


def test_all_bad_lines_are_told_at_once(tmp_path: Path, renderer: Renderer) -> None:
    faults = [fault for fault, (_, reason) in FAULTS["records"].items() if reason in BAD]
    path = write(tmp_path, "records", faults)
    with pytest.raises(DataError) as caught:
        source(path, renderer, Checks("all"))
    text = str(caught.value)
    assert text.startswith(f"{path}: {len(faults)} of {len(faults) + 4} lines are bad: {path}:2: ")
    assert text.count(f"{path}:") == 1 + 5 and f"; and {len(faults) - 5} more; put that right" in text


def test_pixels_are_looked_at_only_where_it_is_asked_for(tmp_path: Path, renderer: Renderer) -> None:
    """``headers`` lets a truncated image pass, ``off`` every file that is there; both are errors at their step."""
    path = write(tmp_path, "records", ["a truncated image"], num_good=1)
    looks: list[tuple[int, bool]] = []

    def look(paths: Sequence[Path], pixels: bool) -> Sequence[Seen]:
        looks.append((len(paths), pixels))
        return look_at(paths, pixels=pixels)

    for images in ("headers", "off"):
        checked = source(path, renderer, Checks(images, "fail", look))
        assert checked.counts.kept == 2
        with pytest.raises(DataError) as caught:
            checked.batch(0)
        assert str(caught.value).startswith(f"{path}:2: field image: {tmp_path}/images/cut.jpg: ")
        assert "put the file right and go on, or go on without it by --on-bad skip" in str(caught.value)
        assert "--change on-bad" in str(caught.value)
    assert looks == [(2, False)], "each file once, and none where it is off"
    with pytest.raises(DataError, match="cut"):
        source(path, renderer, Checks("all", "fail", look))
    assert looks[1:] == [(2, True)]


def test_a_long_prompt_is_an_error_at_its_step_where_no_header_was_read(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path, "records", ["a long question"], num_good=1)
    assert source(path, renderer, Checks("headers")).counts.left_out == {"long_prompt": 1}
    unmeasured = source(path, renderer, Checks("off"))
    assert unmeasured.counts.kept == 2
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: a prompt of \d+ tokens, of which --max-prompt-tokens allows 150"
    ):
        unmeasured.batch(0)


def test_a_complaint_offers_no_flag_that_a_command_does_not_have(tmp_path: Path, renderer: Renderer) -> None:
    with pytest.raises(DataError) as caught:
        source(write(tmp_path, "records", ["no image"]), renderer, Checks(has_flags=False))
    assert "--on-bad" not in str(caught.value)


def test_none_left_says_why(tmp_path: Path, renderer: Renderer) -> None:
    with pytest.raises(NothingLeftError, match=r"no line is left to use: 1 of 1 is held out for validation$"):
        source(write(tmp_path / "a", "records", [], num_good=1), renderer, Checks(), share=1.0)
    with pytest.raises(NothingLeftError, match=r"1 of 2 is not a JSON object, 1 of 2 is with a reference of .* \(/"):
        source(write(tmp_path / "b", "pairs", ["no JSON", "long responses"], num_good=0), renderer, SKIP)


def test_counts_read_as_a_line(tmp_path: Path, renderer: Renderer) -> None:
    counts = source(write(tmp_path, "records", ["no caption", "no image"]), renderer, SKIP).counts
    assert counts.text() == (
        "4 of 6 lines are used; left out: 1 with an image that cannot be read, 1 without a caption"
    )
    assert len(counts.shown) == 1 and "none.png" in counts.shown[0]
