"""prism-data: what it says of a set, its exit status, and that a million records need no more memory than a few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands.data import COMMANDS, main
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from tests.conftest import REPOSITORY
from tests.unit.data.formats.sets import read_set, synthetic

POLICY = MINI_FOLDER / "policy"


def test_a_good_set_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = synthetic(tmp_path / "set")
    assert main(["check", str(source), "--decode", "--require-tags"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{source}: ours, 1 file"
    assert "20: 20 good, 0 bad" in said[1]
    assert said[2:] == [
        "sources      10 own/0, 10 own/1",
        said[3],
        "responses    20 tagged",
        "images       20 with 1",
        "answers      20 with 1",
        "same content 0",
    ]
    held_out = int(said[3].split()[-3])
    assert said[3] == f"parts        {20 - held_out} to train on, {held_out} held out"


def test_every_bad_record_is_said_by_line_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: damage, a bad field, a cut image, a repeated id and lacking tags; skip turns the status to 0."""
    source = synthetic(tmp_path / "set", count=8)
    rows: list[dict[str, Any]] = [json.loads(line) for line in (source / "data.jsonl").read_bytes().splitlines()]
    image = (source / "images" / "03.jpg").read_bytes()
    (source / "images" / "03.jpg").write_bytes(image[:-20])
    rows[1]["caption"] = ""
    rows[2] = {**rows[2], "id": "own-0"}
    rows[5] = {**rows[4], "id": "own-5"}
    rows[6]["caption"] = None
    lines = [json.dumps(row) for row in rows]
    (source / "data.jsonl").write_text("\n".join([*lines, "{"]))
    arguments = ["check", str(source), "--decode", "--require-tags", "--plain-answers"]
    assert main(arguments) == 2
    said = capsys.readouterr().out.splitlines()
    path = source / "data.jsonl"
    bad = [line for line in said if line.startswith("bad ")]
    expected = [
        f"{path}:2: field caption: text that is not empty expected",
        f"{path}:4: field image: {source / 'images' / '03.jpg'}: the image cannot be read: ",
        f"{path}:7: field response: plain, and --require-tags wants the three tags",
        f"{path}:9: not a JSON object: ",
        f"{path}:3: field id: was used before, in {path}:1",
    ]
    assert len(bad) == 5 and all(line.startswith(f"bad {start}") for line, start in zip(bad, expected, strict=True)), (
        bad
    )
    counts = "9: 4 good, 5 bad (1 field caption, 1 field image, 1 field response, 1 unreadable, 1 field id)"
    assert f"records      {counts}" in said
    assert f"same content 1 ({path}:6 is {path}:5)" in said
    assert main([*arguments, "--on-bad", "skip"]) == 0


def test_tags_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        "<caption>a</caption><think>b</think><answer>c</answer>",
        "So.",
        "<think>b</think> So.",
        "<caption>a</caption>",
    ]
    rows = [{"id": str(i), "question": f"{i}?", "output": text} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["check", str(tmp_path / "a.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "1 tagged, 1 plain, 1 broken: <caption> appears 0 times, 1 broken: <think> appears 0 times" in said
    assert "images       4 with 0" in said
    assert "read from    id=id question=question response=output" in said


def test_evaluation_sets_are_looked_at_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = synthetic(tmp_path / "mathvision_testmini", count=2)
    assert main(["check", str(source)]) == 0
    assert "for evaluation only: training refuses this set" in capsys.readouterr().out


def test_figures_are_those_of_the_renderer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: least, mean and most of all four kinds of tokens, and of pixels, with the counts of every power of two."""
    source = synthetic(tmp_path / "set")
    measure = ConversationRenderer(Renderer.from_folder(POLICY), label_turns="last").measure
    lengths = [measure(one) for one in read_set(source)]
    assert main(["stats", str(source), "--model", str(POLICY)]) == 0
    said = capsys.readouterr().out
    for name, values in {
        "tokens": [one.text_tokens + one.visual_tokens for one in lengths],
        "text tokens": [one.text_tokens for one in lengths],
        "visual tokens": [one.visual_tokens for one in lengths],
        "label tokens": [one.label_tokens for one in lengths],
        "pixels of an image": [(32 + i) * 40 for i in range(20)],
    }.items():
        (heading,) = [line for line in said.splitlines() if line.startswith(f"{name}: ")]
        assert f"mean {sum(values) / 20:,.1f}, least {min(values):,}," in heading
        assert f"median {sorted(values)[9]:,}," in heading and heading.endswith(f"most {max(values):,}")
        block = said.partition(heading)[2].partition("\n\n")[0].strip().splitlines()
        rows = [line.replace(",", "").replace("–", " ").split() for line in block]
        for low, high, count, *_ in rows:
            assert int(count) == sum(int(low) <= value <= int(high) for value in values)
        assert sum(int(row[2]) for row in rows) == 20
    total = sum(one.text_tokens + one.visual_tokens for one in lengths)
    assert sum(int(line.split()[2].replace(",", "")) for line in said.splitlines() if "  own/" in line) == total
    assert "responses: 20 tagged" in said


def test_limits_and_bad_records_show_in_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = synthetic(tmp_path / "set", count=3)
    with (source / "data.jsonl").open("a") as file:
        file.write("{\n")
    arguments = ["stats", str(source), "--model", str(POLICY), "--max-pixels", "1024"]
    assert main(arguments) == 2
    said = capsys.readouterr().out
    assert "3 records, 1 bad ones" in said and "visual tokens: mean 1.0, least 1" in said
    assert main([*arguments, "--on-bad", "skip"]) == 0
    assert main(["stats", str(source)]) == 2
    assert capsys.readouterr().err == (
        "error: --model is missing: tokens are counted by a model's tokenizer and image settings\n"
    )


def test_usage_and_missing_sets_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main([]) == 2 and main(["chek"]) == 2
    capsys.readouterr()
    for words in (["check"], ["check", str(tmp_path / "none")], ["convert", "a"], ["energon-state", str(tmp_path)]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """Claim: of a set ten times as long, 20 MB of it, check keeps less than 4 MB more."""
    peaks = []
    for count in (5_000, 50_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps({"id": f"r{i}", "question": f"{i}? " + "x" * 300, "output": "y" * 100}) + "\n")
        code = (
            "import resource, sys\nfrom prism_megatron.commands.data import main\nassert main(sys.argv[1:]) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "check", str(path)], cwd=tmp_path, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert f"{count:,}: {count:,} good" in done.stdout
        peaks.append(int(done.stderr))
    assert peaks[1] - peaks[0] < 4096, peaks
