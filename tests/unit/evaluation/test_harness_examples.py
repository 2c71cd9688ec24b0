"""What ``examples/evaluation`` gives to other harnesses, held against ours where both say the same thing.

Blind to the harnesses: ``tests/lmms_eval`` runs one of them.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from examples.evaluation.lmms_eval import records
from prism_megatron.config.stages.data import STRUCTURED_SYSTEM_PROMPT
from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.records import read_records
from prism_megatron.data.segments import parse_response

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "evaluation"
WHOLE = "<caption>\na\n</caption>\n<think>\nb\n</think>\n<answer>{}</answer>"


@pytest.mark.parametrize(
    ("said", "right", "in_any_form"),
    [
        (WHOLE.format("B"), 1, 1),
        (f"\n {WHOLE.format(' b ')}\n", 1, 1),
        (WHOLE.format("C"), 0, 0),
        (WHOLE.format("B.") + " So B.", 0, 0),
        (f"{WHOLE.format('B')} So B.", 0, 1),
        (f"So: {WHOLE.format('B')}", 0, 1),
        ("<answer>B</answer>", 0, 1),
        (WHOLE.format("B").replace("b\n", " \n"), 0, 1),
        (WHOLE.format("B").replace("\na\n", "<think>a</think>"), 0, 1),
        (WHOLE.format("B").replace("<think>\nb\n</think>\n", ""), 0, 1),
        (WHOLE.format("B").replace("</answer>", ""), 0, 1),
        (WHOLE.format("B").replace("<answer>B</answer>", "</answer>B<answer>"), 0, 0),
        (WHOLE.format("B</think>\n<answer>B"), 0, 0),
        ("<think>\nb\n</think>\n<caption>\na\n</caption>\n<answer>B</answer>", 0, 1),
        (WHOLE.format(""), 0, 0),
        ("B", 0, 0),
        (f"{records.FAILED} after 5 retries] <answer>B</answer>", 0, 1),
    ],
)
def test_verdicts_of_records(said: str, right: float, in_any_form: float) -> None:
    """Claim: an answer counts in the form that ours calls valid, and no other."""
    found = records.verdicts({"answer": "B"}, [said])
    assert found == {"right": right, "right_in_any_form": in_any_form, "failed": float(said.startswith(records.FAILED))}
    valid = not isinstance(parse_response(said.encode()), str)
    assert bool(right) == (valid and bool(in_any_form))


def test_a_record_is_asked_as_ours_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: question and pixels are those that training sees, of transparent, indexed and turned images too."""
    (tmp_path / "images").mkdir()
    picture = Image.linear_gradient("L").convert("RGB")
    seen = picture.convert("RGBA")
    seen.putalpha(Image.linear_gradient("L").rotate(90))
    indexed = picture.quantize(32)
    indexed.info["transparency"] = 3
    lines = []
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    pictures = {"plain": picture, "alpha": seen, "indexed": indexed, "grey": picture.convert("L"),
                "turned": picture.resize((90, 60))}  # fmt: skip
    for name, image in pictures.items():
        image.save(tmp_path / "images" / f"{name}.png", exif=turned if name == "turned" else None)
        choices = ["one", "two"] if name == "plain" else None
        lines.append({"id": name, "image": f"images/{name}.png", "question": "How many?", "choices": choices,
                      "answer": "B" if choices else "2", "answer_type": "choice" if choices else "integer",
                      "solution": None, "caption": None, "source": "made"})  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    for line, record in zip(lines, read_records(tmp_path, purpose="evaluate"), strict=True):
        assert records.question(line) == record.question_text
        (shown,) = records.pictures(line)
        ours = to_rgb(open_image(record.image))
        assert ours.size == ((60, 90) if record.id == "turned" else picture.size)
        assert shown.mode == "RGB" and shown.tobytes() == ours.tobytes()


@pytest.fixture(scope="module")
def tasks() -> dict[str, dict[str, Any]]:
    group = yaml.safe_load((EXAMPLES / "lmms_eval" / "benchmarks.yaml").read_text())
    return {task["task"]: task for task in group["task"]}


def test_every_benchmark_is_drawn_as_the_paper_draws(tasks: dict[str, dict[str, Any]]) -> None:
    lengths = {name: task["generation_kwargs"].pop("max_new_tokens") for name, task in tasks.items()}
    assert lengths == {"mathvista_testmini": 16384, "mathverse_testmini": 16384, "mathvision_testmini": 24576,
                       "wemath_testmini_reasoning": 49152, "mmmu_val": 8192, "mmmu_pro": 8192,
                       "hallusion_bench_image": 8192}  # fmt: skip
    drawn = {name: task["generation_kwargs"] for name, task in tasks.items()}
    assert drawn.pop("hallusion_bench_image") == {"temperature": 0}
    assert all(one == {"temperature": 1, "top_p": 0.7} for one in drawn.values())


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        (WHOLE.format(" B "), ["B"]),
        (f"<answer>A</answer> {WHOLE.format('B')}", ["A", "B"]),
        ("<answer>A\n</think>\n<answer>B < C</answer>", ["B < C"]),
        ("It is (B).\n", ["It is (B)."]),
        (WHOLE.format("B")[: -len("</answer>")], []),
        ("<answer></answer>", []),
        ("", []),
    ],
)
def test_what_a_benchmark_is_given(tasks: dict[str, dict[str, Any]], said: str, taken: list[str]) -> None:
    """Claim: what stands in the tags, of which the last counts; all of an answer that opens none; else nothing."""
    (one,) = {task["filter_list"][0]["filter"][0]["regex_pattern"] for task in tasks.values() if "filter_list" in task}
    found = [next(part for part in match if part).strip() for match in re.compile(one).findall(said)]
    assert found == taken


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", " ", "<", "a\n"])
def test_no_long_answer_holds_an_evaluation_up(tasks: dict[str, dict[str, Any]], piece: str) -> None:
    """Claim: patterns are linear; one that is not takes minutes for the first piece."""
    pattern = tasks["mmmu_val"]["filter_list"][0]["filter"][0]["regex_pattern"]
    began = time.process_time()
    said = piece * (200_000 // len(piece))
    re.compile(pattern).findall(said)
    records.verdicts({"answer": "B"}, [said])
    assert time.process_time() - began < 5


def test_vlmevalkit_sends_the_prompt_of_training() -> None:
    config = json.loads((EXAMPLES / "vlmevalkit" / "benchmarks.json").read_text())
    (model,) = config["model"].values()
    assert model["system_prompt"] == STRUCTURED_SYSTEM_PROMPT
    assert model["api_base"].endswith("/v1/chat/completions")
    assert all(name == data["dataset"] for name, data in config["data"].items())
    assert len(config["data"]) == 8
