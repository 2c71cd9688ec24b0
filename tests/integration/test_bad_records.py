"""Records with every bad thing at once: skipped and counted, or refused in one line; killed and resumed as if never.

Blind spot: what a fault of each kind is counted as, which is in ``tests/unit/data/test_admission.py``.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.data.records import Record, in_part
from prism_megatron.observability.metrics import read_metrics
from tests.integration.test_align_records import TOOL, write_records
from tests.integration.test_resume import assert_same
from tests.waiting import wait_for

FLAGS = ("--max-response-tokens", "96", "--prompts-per-step", "2", "--rollouts-per-prompt", "2", "--dtype", "fp32",
         "--tokens-per-microbatch", "512", "--format-sft", "0", "--save-every", "1", "--steps", "3")  # fmt: skip
SKIP = ("--on-bad", "skip", "--check-images", "all")
NUM_GOOD = 16


def make_set(folder: Path) -> dict[str, int]:
    """Good records with one of every bad thing among them, also such as nobody takes for bad; how many of each."""
    write_records(folder, NUM_GOOD)
    path = folder / "data.jsonl"
    good = path.read_text().splitlines()
    record: dict[str, Any] = json.loads(good[0])
    (folder / "images" / "cut.jpg").write_bytes(_noise(folder)[:-400])
    (folder / "images" / "damaged.avif").write_bytes(b"\0\0\0\x1cftypavif" + bytes(100))
    bad: list[tuple[str, dict[str, Any] | bytes]] = [
        ("bad_json", b'{"id": "open'),
        ("bad_json", b'{"id": "a", "id": "b"}'),
        ("bad_json", '{"id": "é"}'.encode("latin-1")),
        ("bad_json", b"[" * 100_000),
        ("bad_field", {"image": ["images/0.png"]}),
        ("bad_field", {"answer": 3}),
        ("bad_field", {"extra": None}),
        ("repeated_id", {"id": record["id"]}),
        ("evaluation_only", {"source": "mathvision/testmini"}),
        ("bad_image", {"image": "images/none.png"}),
        ("bad_image", {"image": "images/cut.jpg"}),
        ("bad_image", {"image": "images/damaged.avif"}),
        ("bad_text", {"question": "What is <|image_pad|>?"}),
        ("bad_text", {"caption": "<|im_end|>"}),
        ("no_caption", {"caption": None}),
        ("long_prompt", {"question": "many " * 3000}),
        ("long_response", {"caption": "many " * 200}),
    ]
    lines = [line.encode() for line in good]
    for number, (_, change) in enumerate(bad):
        line = change if isinstance(change, bytes) else json.dumps({**record, "id": _id(number), **change}).encode()
        lines.insert(2 * number, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return {reason: sum(name == reason for name, _ in bad) for reason, _ in bad} | {"lines": len(lines)}


def _id(number: int) -> str:
    """One that is not held out, so that what is wrong with the record is found."""
    names = (f"bad-{number}-{i}" for i in range(1000))
    return next(
        name
        for name in names
        if in_part(Record(name, Path("x"), "q", None, "1", None, "c", "made/train"), "train", validation_share=0.1)
    )


def _noise(folder: Path) -> bytes:
    path = folder / "images" / "noise.jpg"
    Image.effect_noise((96, 96), 90).save(path)
    return path.read_bytes()


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *flags], capture_output=True, text=True, timeout=300, check=False)


def test_every_bad_thing_at_once_is_skipped_counted_and_resumed_exactly(tmp_path: Path) -> None:
    """Claim: a SIGKILL in the middle changes no row, and what is kept and left out adds up to the lines."""
    counts = make_set(tmp_path / "set")
    flags = ("--data", str(tmp_path / "set"), *FLAGS, *SKIP)
    whole = run(*flags, "--output", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert len(expected) == 3
    # What is said and kept of the data.
    data = json.loads((tmp_path / "whole" / "summary.json").read_text())["data"]
    assert {name: data[name] for name in counts} == counts
    assert data["lines"] == data["kept"] + sum(
        count for name, count in data.items() if name not in ("lines", "kept", "without_reasoning")
    )
    assert data["kept"] + data.get("held_out", 0) == NUM_GOOD
    assert whole.stdout.count(f"data: {data['kept']} of {data['lines']} lines are used") == 1
    assert whole.stdout.count("left out: /") == 5, "the first bad lines are named"
    # The same run, killed once it has saved a step.
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(TOOL), *flags, "--output", str(killed)], stdout=subprocess.DEVNULL)
    wait_for(lambda: (killed / "checkpoints" / "step_000001" / "state.json").exists() or process.poll() is not None,
             seconds=300.0)  # fmt: skip
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(killed / "checkpoints" / "step_000003", ignore_errors=True)
    again = run("--load", str(killed))
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same(read_metrics(killed / "metrics.jsonl"), expected)
    assert json.loads((killed / "summary.json").read_text())["data"] == data


def test_bad_records_are_refused_in_one_line_that_names_them(tmp_path: Path) -> None:
    counts = make_set(tmp_path / "set")
    result = run("--data", str(tmp_path / "set"), *FLAGS, "--check-images", "all", "--output", str(tmp_path / "run"))
    assert result.returncode == 2
    bad = sum(count for reason, count in counts.items() if reason.startswith("bad")) + 2
    assert len(result.stderr.splitlines()) == 1
    assert f"data.jsonl: {bad} of {counts['lines']} lines are bad: " in result.stderr
    assert f"; and {bad - 5} more; put that right, or leave out what is bad by --on-bad skip" in result.stderr
    assert not (tmp_path / "run").exists(), "a refused start leaves no folder"


@pytest.mark.long
def test_a_warm_start_skips_bad_pairs_and_counts_them(tmp_path: Path) -> None:
    write_records(tmp_path / "set", 12)
    records = [json.loads(line) for line in (tmp_path / "set" / "data.jsonl").read_text().splitlines()]
    text = "<caption>\n{}\n</caption>\n<think>\n{}\n</think>\n<answer>{}</answer>"
    lines = [
        json.dumps(
            {
                "id": one["id"],
                "image": one["image"],
                "question": one["question"],
                "chosen": text.format(one["caption"], one["solution"], one["answer"]),
                "rejected": [text.format("- red circle: 1", "red circle: 1", "9")],
                "source": "made",
            }
        )
        for one in records
    ]
    lines[3:3] = ["{", lines[0].replace("images/0.png", "images/none.png")]
    (tmp_path / "set" / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    result = subprocess.run(
        [sys.executable, str(TOOL.with_name("run_warm_start.py")), "--pairs", str(tmp_path / "set" / "pairs.jsonl"),
         "--prompts-per-step", "4", "--steps", "1", "--tokens-per-microbatch", "512", "--gate-prompts", "1",
         "--output", str(tmp_path / "run"), *SKIP],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert (data["lines"], data["bad_json"], data["bad_image"]) == (14, 1, 1)
    assert data["kept"] + data.get("held_out", 0) == 12
