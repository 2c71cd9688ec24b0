"""What is wrong with a set is said by file, record and field, with what to do; one fault of each kind."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.formats.detect import format_of, open_corpus
from prism_megatron.data.formats.files.walk import walk
from prism_megatron.errors import ConfigError, DataError
from tests.unit.data.formats.sets import ANSWER, CHAT, USER, WRITERS, add, parquet, png, read_set, records_of, synthetic


def lines(folder: Path, *rows: Any) -> Path:
    """A set of lines with two images, one a link inside the folder, one a link out of it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "1.png").write_bytes(png(1))
    (folder.parent / "out.png").write_bytes(png(2))
    for name, target in (("in.png", "1.png"), ("out.png", folder.parent / "out.png")):
        if not (folder / "images" / name).is_symlink():
            (folder / "images" / name).symlink_to(target)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), "images": ["images/1.png"], **more}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**CHAT, "images": []}, r"field messages\[0\]: more places for images"),
        ({**CHAT, "images": ["images/1.png"] * 2}, r"field images: 2 images for 1 <image> in the text"),
        (chat({"role": "user", "content": "Why?"}, ANSWER), r"field images: 1 image for 0 <image>"),
        (
            chat(USER, {"role": "assistant", "content": "<image>"}, images=["images/1.png"] * 2),
            "only users show images",
        ),
        (chat(USER), r"field messages: user and assistant must take turns.*found user$"),
        (chat(USER, USER, ANSWER, images=["images/1.png"] * 2), "found user, user, assistant"),
        (chat(ANSWER, images=[]), "found assistant"),
        (chat(USER, ANSWER, {"role": "system", "content": "x"}), "found user, assistant, system"),
        (chat({"role": "tool", "content": "x"}, ANSWER), r"field messages\[0\]: role 'tool' is none of system, user"),
        (chat({"role": "user"}, ANSWER), r"field messages\[0\]: text expected, and it is null"),
        (chat(USER, {"role": "assistant", "content": " "}), r"field messages\[1\]: text that is not empty"),
        (chat({"role": "user", "content": [{"type": "audio"}]}, ANSWER), r"items of type text and image"),
        ({**CHAT, "messages": "Why?"}, "field messages: a list of messages expected"),
        ({**CHAT, "messages": []}, "field messages: a list of messages expected"),
        ({**CHAT, "messages": [1, 2]}, r"field messages\[0\]: an object with role and content"),
        ({**CHAT, "videos": ["a.mp4"]}, "field videos: only text and images are read; take the record out"),
        ({**CHAT, "images": ["../out.png"]}, "field image: '../out.png' must be a path below the set's folder"),
        ({**CHAT, "images": ["/etc/hostname"]}, "must be a path below the set's folder"),
        ({**CHAT, "images": ["images/out.png"]}, "field image: 'images/out.png' is not a file inside"),
        ({**CHAT, "images": ["images/none.png"]}, "field image: 'images/none.png' cannot be found"),
        ({**CHAT, "images": ["https://x/y.png"]}, "is no file of the set; download it"),
        ({**CHAT, "images": [7]}, "field image: a path, bytes, or an object with bytes and path expected, not int '7'"),
        ({**CHAT, "images": [{"bytes": None, "path": None}]}, "field image: a path, bytes"),
        ({**CHAT, "images": ["\ud800"]}, "field image: holds half of a surrogate pair"),
        ({**CHAT, "id": {}}, "field id: text expected, and it is an object"),
        ({**CHAT, "source": "mathvision/x"}, "field source: 'mathvision/x' is for evaluation only"),
        ([1], r"an object with the record's fields expected, not list '\[1\]'"),
    ],
)
def test_a_bad_record_is_named(row: Any, problem: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "set", CHAT, row, CHAT)
    outcomes = list(walk(open_corpus(path, FormatConfig(), purpose="train")))
    assert [isinstance(found, DataError) for _, found in outcomes] == [False, True, False]
    where, found = outcomes[1]
    assert where == f"{path}:2"
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{problem}"):
        raise found if isinstance(found, DataError) else AssertionError


def test_a_link_inside_the_set_is_followed(tmp_path: Path) -> None:
    (conversation,) = read_set(lines(tmp_path / "set", {**CHAT, "images": ["images/in.png"]}))
    assert conversation.pictures[0].stored == (tmp_path / "set" / "images" / "1.png").resolve()


def test_turns_images_and_system_messages_of_any_number(tmp_path: Path) -> None:
    """Claim: several images and turns, text alone, items of chat templates, a system message on either side."""
    rows = [
        chat(USER, ANSWER, {"role": "user", "content": "And <image>, <image>?"}, ANSWER, images=["images/1.png"] * 3),
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "system": "Be brief."},
        chat({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a <image> tag"}]}, ANSWER),
        {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Why?"}, ANSWER], "system": ""},
    ]
    several, alone, items, system = read_set(lines(tmp_path / "set", *rows))
    assert len(several.pictures) == 3 and [turn.role for turn in several.turns] == ["user", "assistant"] * 2
    assert [part for part in several.turns[2].parts if isinstance(part, str)] == ["And ", ", ", "?"]
    assert [(turn.role, *turn.parts) for turn in alone.turns] == [
        ("system", "Be brief."), ("user", "Why?"), ("assistant", "So."),
    ]  # fmt: skip
    assert items.turns[0].parts[1] == "a <image> tag" and len(items.pictures) == 1
    assert system.turns[0].parts == ("Be.",)


def test_messages_may_stand_in_parquet(tmp_path: Path) -> None:
    path = parquet([{**CHAT, "images": [{"bytes": png(1), "path": None}]}], tmp_path / "chat.parquet")
    assert format_of(path) == "sharegpt"
    (conversation,) = read_set(path)
    assert conversation.pictures[0].stored == png(1) and conversation.turns[1].parts == ("So.",)


def test_thought_becomes_think_in_a_valid_response_only(tmp_path: Path) -> None:
    valid = "<caption>a</caption><thought>b</thought><answer>c</answer>"
    rows = [chat(USER, {"role": "assistant", "content": text}) for text in (valid, "I <thought>think</thought>.")]
    one, other = read_set(lines(tmp_path / "set", *rows))
    assert one.turns[-1].parts == ("<caption>a</caption><think>b</think><answer>c</answer>",)
    assert other.turns[-1].parts == ("I <thought>think</thought>.",)


@pytest.mark.parametrize("name", ["ours", *WRITERS])
def test_evaluation_sets_are_refused_in_every_format(name: str, tmp_path: Path) -> None:
    """Claim: by source and by sets.json, and read for evaluation."""
    for source, folder in (("mathvision/test", tmp_path / "by_source"), ("own/1", tmp_path / "marked")):
        ours = synthetic(folder / "ours", count=2)
        (ours / "data.jsonl").write_text((ours / "data.jsonl").read_text().replace('"own/1"', f'"{source}"'))
        (folder / "theirs").mkdir()
        path = ours if name == "ours" else WRITERS[name](records_of(ours), folder / "theirs")
        corpus = open_corpus(path, FormatConfig(plain_answers=True), purpose="train")
        outcomes = [found for _, found in walk(corpus)]
        assert not isinstance(outcomes[0], DataError)
        assert isinstance(outcomes[1], DataError) == (source == "mathvision/test")
        assert len(read_set(path, purpose="evaluate", plain_answers=True)) == 2
    (folder / "sets.json").write_text(json.dumps({key: {"evaluation_only": True} for key in ("ours", "theirs")}))
    with pytest.raises(DataError, match="for evaluation only; train on another set"):
        open_corpus(path, FormatConfig(plain_answers=True), purpose="train")
    assert len(read_set(path, purpose="evaluate", plain_answers=True)) == 2
    file = open_corpus(path, FormatConfig(), purpose="evaluate").shards()[0]
    with pytest.raises(DataError, match="for evaluation only"):
        open_corpus(file, FormatConfig(), purpose="train")


@pytest.mark.parametrize(
    ("row", "settings", "problem"),
    [
        ({"problem": "Why?", "answer": "So."}, {}, "field caption: missing; --plain-answers learns the answer alone"),
        ({"problem": "Why?", "answer": "So.", "caption": "c"}, {}, "field solution: missing; --plain-answers"),
        ({"problem": "Why?", "solution": "s"}, {"plain_answers": True}, "field answer: missing"),
        ({"q": "Why?", "answer": "So."}, {}, "field question: missing; it is looked for as question, .*--columns"),
        ({"problem": "Why?"}, {"columns": ("question=frage",)}, "--columns question=frage: the record has problem"),
        ({"problem": "Why?", "answer": "1", "options": ["a", 3.5, None]}, {}, "field choices: a list of texts"),
        ({"problem": "Why?", "answer": "1", "options": "ab"}, {}, "field choices: a list of texts expected, not str"),
        ({"problem": "Why?", "answer": "1", "options": ["a"] * 27}, {}, "field choices: 27 choices"),
        ({"problem": "a<image>", "answer": "1", "output": "x"}, {}, "field question: more places for images"),
        (
            {"problem": "a<image>", "output": "x", "images": ["images/1.png"] * 2}, {},
            "field images: 2 images for 1 <image>",
        ),
        (
            {"problem": "Why?", "answer": "</answer>", "caption": "c", "solution": "s"}, {},
            "caption, solution and answer make no valid response: </answer> appears 2 times",
        ),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(row: Any, settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "set", row)
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{problem}"):
        read_set(path, format="columns", **settings)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"teacher_cot": "<think>a</think>", "reward_model": {"ground_truth": 2}}, "make no valid response"),
        ({"teacher_cot": None, "teacher_caption": None}, "field answer: missing"),
        ({"teacher_cot": None}, "field answer: missing"),
        (
            {"teacher_caption": None, "teacher_cot": None, "teacher_response": "So."},
            "field teacher_response: not a valid",
        ),
        ({"reward_model": "2"}, "field reward_model: an object with ground_truth"),
        ({"prompt": 3}, "field prompt: a list of messages, or text"),
        ({"prompt": " "}, "field prompt: text that is not empty"),
    ],
)
def test_a_bad_row_of_prism_is_named(change: Any, problem: str, tmp_path: Path) -> None:
    good = {"prompt": "<image>Why?", "image": "images/1.png", "teacher_caption": "c", "student_caption": "x",
            "teacher_cot": "<thought>\nt\n</thought> <answer>2</answer>"}  # fmt: skip
    path = lines(tmp_path / "set", good, {**good, **change})
    (conversation, found) = (one for _, one in walk(open_corpus(path, FormatConfig(), purpose="train")))
    assert not isinstance(conversation, DataError) and conversation.answer == "2"
    assert conversation.turns[-1].parts == (
        "<caption>\nc\n</caption>\n<think>\nt\n</think>\n<answer>2</answer>",
    )  # fmt: skip
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{problem}"):
        raise found if isinstance(found, DataError) else AssertionError


def test_formats_that_cannot_be_told_are_listed(tmp_path: Path) -> None:
    """Claim: nothing, too much, and what no format has; each names the formats and the flag."""
    unknown = lines(tmp_path / "a", {"x": 1})
    both = lines(tmp_path / "b", {**CHAT, "reward_model": {}})
    for path, problem in (
        (unknown, "no format .* fit a record with the fields x"),
        (both, r"several formats \(verl, sharegpt\)"),
    ):
        with pytest.raises(
            DataError, match=rf"{problem}.*--format {{ours,sharegpt,columns,verl,prism,webdataset,energon}}"
        ):
            format_of(path)
    tars = tmp_path / "c"
    synthetic(tars, count=1)
    with tarfile.open(tars / "x.tar", "w") as tar:
        add(tar, "a.json", b"{}")
    with pytest.raises(DataError, match="may be webdataset or ours; say which by --format"):
        format_of(tars)
    for name, problem in (
        ("empty", "holds no file that ends in .jsonl, .json, .parquet"),
        ("arrow", "write it by to_parquet"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if name == "arrow":
            (folder / "state.json").write_text("{}")
            (folder / "data-00000-of-00001.arrow").write_bytes(b"")
        with pytest.raises(DataError, match=problem):
            format_of(folder)
    (tmp_path / "a" / "more.json").write_text("[]")
    with pytest.raises(DataError, match=r"holds several files of records \(more\.json, train\.jsonl\)"):
        format_of(tmp_path / "a")
    with pytest.raises(DataError, match="does not exist; name a file or a folder"):
        open_corpus(tmp_path / "nowhere", FormatConfig(), purpose="train")
    with pytest.raises(DataError, match=r"no record in .* tells the format"):
        format_of(lines(tmp_path / "d", [1]))
    (tmp_path / "e.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"e\.csv: records are read from files that end in .jsonl, .json, .parquet"):
        format_of(tmp_path / "e.csv")


@pytest.mark.parametrize("pair", ["question", "question=", "frage=x"])
def test_a_wrong_columns_flag_is_named(pair: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--columns {pair} must be FIELD=NAME, with FIELD one of id, source"):
        open_corpus(lines(tmp_path / "set", CHAT), FormatConfig(columns=(pair,)), purpose="train")


def test_columns_parts_and_folders_of_images_are_named_by_flags(tmp_path: Path) -> None:
    row = {"frage": "Why?", "bild": "1.png", "antwort": 2, "woher": "here"}
    path = lines(tmp_path / "set", row)
    names = ("question=frage", "images=bild", "answer=antwort", "source=woher")
    images = tmp_path / "set" / "images"
    (conversation,) = read_set(path, format="columns", columns=names, images=images, plain_answers=True)
    assert (conversation.source, conversation.answer) == ("here", "2") and len(conversation.pictures) == 1
    folder = tmp_path / "parts"
    for part in ("train", "test"):
        parquet([{"question": part, "output": "So."}], folder / f"{part}-00000-of-00001.parquet")
    for split, expected in (("train", ["train"]), ("test", ["test"]), ("all", ["test", "train"])):
        assert [one.turns[0].parts[-1] for one in read_set(folder, split=split)] == expected
    with pytest.raises(DataError, match="has files of test, train, and none of val; --split test, train or all"):
        read_set(folder, split="val")


def test_parquet_needs_its_extra_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet([{"question": "Why?", "output": "So."}], tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read as Parquet"):
        read_set(tmp_path / "b.parquet")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'prism-megatron\[parquet\]'"):
        read_set(path)


def test_a_hub_cache_may_link_to_its_blobs_and_nothing_else(tmp_path: Path) -> None:
    """Claim: snapshots of a Hugging Face cache are links to files beside them; a link to anywhere else is refused."""
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / "abc"
    blob = parquet([{"question": "Why?", "output": "So."}], tmp_path / "datasets--org--name" / "blobs" / "12.parquet")
    snapshot.mkdir(parents=True)
    (snapshot / "train.parquet").symlink_to(os.path.relpath(blob, snapshot))
    assert len(read_set(snapshot)) == 1
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "train.parquet").symlink_to(blob)
    with pytest.raises(DataError, match="is a link that leads out of"):
        read_set(plain)
    (plain / "train.parquet").unlink()
    (plain / "train.parquet").symlink_to("train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet cannot be found"):
        read_set(plain)
