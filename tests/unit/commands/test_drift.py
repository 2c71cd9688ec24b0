"""``prism-drift``: a table for each named set, a file of figures, and one error for what cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from prism_megatron.commands.drift import main
from prism_megatron.data.segments import response_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sets of 40 responses, whose captions differ, and embeddings of their words."""
    for name, caption in (("a", "- a cat"), ("b", "- a cat\n- a dog")):
        lines = [{"id": str(n), "response": response_text(caption, f"cat {n}", "1")} for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    words = tmp_path / "words"
    words.mkdir()
    vocabulary = {word: number for number, word in enumerate(["?", "a", "cat", "dog", "-"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(words / "t.json"))
    save_file({"table": np.eye(5, dtype=np.float32)}, words / "t.safetensors")
    return tmp_path


def test_tables_and_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: each named set on its own, by the same figures on the terminal and in the file; the same twice."""
    output = folder / "out" / "drift.json"
    argv = [str(folder / "a.jsonl"), "--against", f"b={folder / 'b.jsonl'}", f"itself={folder / 'a.jsonl'}",
            "--embeddings", str(folder / "words"), "--permutations", "99", "--output", str(output)]  # fmt: skip
    assert main(argv) == 0
    said, written = capsys.readouterr(), output.read_text()
    figures = json.loads(written)
    assert said.err == ""
    items = figures["against"]["b"]["distances"]["caption_items"]["wasserstein"]
    assert items == {"texts": [40, 40], "pairs": True, "means": [1.0, 2.0],
                     "distance": {"value": 1.0, "expected": items["distance"]["expected"], "p": 0.01}}  # fmt: skip
    captions = figures["against"]["b"]["distances"]["caption"]
    assert captions["mmd2"]["distance"]["value"] > 0.5
    assert captions["mmd2_same_length"] == {"texts": [0, 0], "pairs": True, "means": [None, None], "distance": None}
    itself = figures["against"]["itself"]["distances"]
    assert all(one["distance"]["p"] == 1.0 for kinds in itself.values() for one in kinds.values())
    assert figures["against"]["b"]["first"] == {"responses": 40, "not_in_form": 0, "lines_left_out": 0}
    assert figures["settings"]["embeddings"] == str(folder / "words" / "t.safetensors")
    (line,) = (
        line for line in said.out.splitlines() if "caption_items" in line and "1.00 : 2.00" in line and "W" in line
    )
    assert line.split()[-3] == "1.00000" and line.split()[-1] == "0.0100"
    assert "fewer than 20 texts" in said.out
    assert main(argv) == 0
    assert output.read_text() == written


def test_demonstrations_of_other_formats_are_a_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: in the form of chats, in a file or in its folder; the last turn counts, and --most are drawn."""
    own = [json.loads(line)["response"] for line in (folder / "b.jsonl").read_text().splitlines()]
    chats = [
        {"id": f"c{n}", "image": "x.png", "conversations": [
            {"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": text}]} for n, text in enumerate(own)
    ]  # fmt: skip
    place, output = folder / "chats", folder / "drift.json"
    place.mkdir()
    (place / "chats.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in chats))
    Image.new("RGB", (8, 8)).save(place / "x.png")
    argv = [str(folder / "b.jsonl"), "--against", f"sft={place}", f"file={place / 'chats.jsonl'}", "--permutations",
            "19", "--embeddings", str(folder / "words"), "--output", str(output)]  # fmt: skip
    assert main(argv) == 0
    for found in json.loads(output.read_text())["against"].values():
        assert found["second"] == {"responses": 40, "not_in_form": 0, "lines_left_out": 0}
        assert found["distances"]["reasoning_words"]["wasserstein"]["distance"]["value"] == 0.0
        assert not found["distances"]["caption"]["mmd2"]["pairs"]
    assert main([*argv, "--most", "25"]) == 0
    assert json.loads(output.read_text())["against"]["sft"]["second"]["lines_left_out"] == 15


def test_without_embeddings_the_rest_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_megatron.evaluation.drift.embeddings.PACKAGE", "no_such_package")
    assert main([str(folder / "a.jsonl"), "--against", f"b={folder / 'b.jsonl'}", "--permutations", "19"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("no distances of embeddings: ") and said.err.count("\n") == 1
    assert "MMD" not in said.out and "Jensen-Shannon" in said.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{a}"], "--against is needed"),
        (["{a}", "--against", "b.jsonl"], "--against b.jsonl: write NAME=SET"),
        (["{a}", "--against", "b={a}", "b={b}"], "another set is called 'b' too"),
        (["{a}", "--against", "b={a}x"], "is no file of responses"),
        (["--against", "b={b}"], "name the responses that are compared"),
        (["{words}", "--against", "b={b}"], "holds neither responses (JSON lines with id and response) nor demonstr"),
        (["{a}", "--against", "b={b}", "--embeddings", "{a}"], "is not a folder"),
        (["{a}", "--against", "b={b}", "--embeddings", "{words}/.."], "has 0 files *.json"),
        (["{a}", "--against", "b={b}", "--output", "{words}"], "is a folder; name a file"),
        (["{a}", "--against", "b={b}", "--permutations", "9"], "--permutations 9 must be at least 19"),
    ],
)
def test_what_cannot_work_is_one_line(
    argv: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"a": folder / "a.jsonl", "b": folder / "b.jsonl", "words": folder / "words"}
    assert main([one.format_map(places) for one in argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err
