"""``examples/evaluation/lmms_eval/benchmarks.yaml`` under lmms-eval's own tasks, on made-up questions of each.

Blind to the published sets, which are not here, and to real judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lmms_eval.harness import FAILED, TASKS, Harness, said
from tests.lmms_eval.made_benchmarks import RESPONSE, SPLITS, respond, write_benchmarks
from tests.unit.stages.fake_chat import FakeChat, fake_chat

pytestmark = pytest.mark.slow

SET_OF = {"mathvista_testmini": "mathvista", "mathverse_testmini": "mathverse", "mathvision_testmini": "mathvision",
          "wemath_testmini_reasoning": "wemath", "mmmu_val": "mmmu_val", "mmmu_pro_standard": "mmmu_pro_standard",
          "mmmu_pro_vision": "mmmu_pro_vision", "hallusion_bench_image": "hallusion"}  # fmt: skip
LENGTHS = {"mathvista": 16384, "mathverse": 16384, "mathvision": 24576, "wemath": 49152, "mmmu_val": 8192,
           "mmmu_pro": 8192, "hallusion": 8192}  # fmt: skip
"""PRISM's ``scripts/eval``: most tokens of an answer."""


def made(folder: Path, judged_by_path: bool) -> Path:
    """The example's group ``made``, its tasks on made-up sets: HallusionBench alone, or all others."""
    group = yaml.safe_load((TASKS / "benchmarks.yaml").read_text())
    files, tasks = write_benchmarks(folder / "sets"), []
    for task in group["task"]:
        # A group of two tasks, each of which has a set of its own.
        names = ("mmmu_pro_standard", "mmmu_pro_vision") if task["task"] == "mmmu_pro" else (task["task"],)
        for name in names:
            kind = SET_OF[name]
            data = {"dataset_path": "parquet", "dataset_name": None,
                    "dataset_kwargs": {"data_files": {SPLITS[kind]: str(files[kind])}}}  # fmt: skip
            if (kind == "hallusion") == judged_by_path:
                tasks.append({**task, **data, "task": name})
    include = folder / "tasks"
    include.mkdir()
    (include / "made.yaml").write_text(yaml.safe_dump({"group": "made", "task": tasks}))
    return include


@pytest.fixture
def chat() -> Iterator[FakeChat]:
    with fake_chat(respond) as chat:
        yield chat


def verdict(task: str, line: Mapping[str, Any]) -> bool:
    """What a benchmark's own code found of one answer."""
    if "mathvista" in task:
        return bool(line["llm_as_judge_eval"]["true_false"])
    if "mathverse" in task:
        return bool(line["gpt_eval_score"])
    if "mathvision" in task:
        return bool(line["mathvision_standard_eval"]["scores"][0])
    if "wemath" in task:
        return bool(line["acc_score"])
    found = line["mmmu_acc"]
    predicted = found["parsed_pred"]
    return bool(found["answer"] == (predicted[0] if isinstance(predicted, list) else predicted))


def test_each_benchmark_judges_what_stands_in_the_tags(chat: FakeChat, tmp_path: Path) -> None:
    """Claim: lmms-eval's own code of six benchmarks takes the right answer in the tags for right and the wrong one for
    wrong, whatever letters the caption and the reasoning hold; every request has the paper's length and way to draw,
    the seed that was asked for, and no system message."""
    harness = Harness(chat.url, "a key", "mine", tmp_path / "harness")
    found = harness.run("made", include=made(tmp_path, judged_by_path=False), flags=["--gen_kwargs", "seed=7"])
    verdicts = {task: [verdict(task, line) for line in lines] for task, lines in found.items()}
    print(f"\nverdicts of lmms-eval's tasks: {verdicts}")
    assert len(found) == 9, "three of MathVista, two of MMMU-Pro, one of each other"
    for task, own in verdicts.items():
        assert own == ([True, True, True, False] if "wemath" in task else [True, False]), task
    asked = [body for body in chat.bodies if isinstance(body["messages"][-1]["content"], list)]
    assert len(asked) == sum(map(len, found.values()))
    assert {len(body["messages"]) for body in asked} == {1}
    assert {(body["temperature"], body["top_p"], body["seed"]) for body in asked} == {(1, 0.7, 7)}
    expected = sorted(
        length for task, lines in found.items() for name, length in LENGTHS.items() if name in task for _ in lines
    )
    assert sorted(body["max_tokens"] for body in asked) == expected
    judges = [body["messages"][0]["content"] for body in chat.bodies if body not in asked]
    assert judges and not any("<caption>" in prompt or "<think>" in prompt for prompt in judges)
    assert not any(FAILED in said(line) for lines in found.values() for line in lines)


def test_hallusion_bench_is_asked_greedily_and_judged_at_a_full_address(chat: FakeChat, tmp_path: Path) -> None:
    """Claim: its judge is asked at ``OPENAI_API_URL`` itself, sees what stands in the tags, and decides."""
    harness = Harness(chat.url, "a key", "mine", tmp_path / "harness", judge_url=f"{chat.url}/chat/completions")
    found = harness.run("made", include=made(tmp_path, judged_by_path=True))
    (lines,) = found.values()
    assert [said(line) for line in lines] == [RESPONSE.format(answer="No"), RESPONSE.format(answer="Yes")]
    assert [line["filtered_resps"] for line in lines] == ["No", "Yes"]
    figures = harness.results("made")["hallusion_bench_image"]
    assert figures["aAcc,answer"] == 50.0
    asked = [body for body in chat.bodies if isinstance(body["messages"][-1]["content"], list)]
    assert [(body["temperature"], "top_p" in body, body["max_tokens"]) for body in asked] == [(0, False, 8192)] * 2
