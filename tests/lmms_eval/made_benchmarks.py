"""Two questions of each benchmark, made up in the columns of the published sets, and who answers and judges them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.unit.stages.fake_chat import answer

RESPONSE = (
    "<caption>\n- A, C, D and E are marked; \\boxed{{C}}\n</caption>\n<think>\nIs it C? The answer is D.\n</think>\n"
    "<answer>{answer}</answer>"
)
"""Of its letters only that of the answer's tags counts."""
SPLITS = {"mathvista": "testmini", "mathverse": "testmini", "mathvision": "testmini", "wemath": "testmini",
          "mmmu_val": "validation", "mmmu_pro_standard": "test", "mmmu_pro_vision": "test",
          "hallusion": "image"}  # fmt: skip
_OPTIONS = "['one', 'two', 'three', 'four', 'five']"
_SAY = re.compile(r"\[say (\w+)\]")


def write_benchmarks(folder: Path) -> dict[str, Path]:
    """A Parquet file of each, by the names of ``SPLITS``. The last question of each is answered wrong, others right."""
    folder.mkdir(parents=True)
    return {name: _write(folder / f"{name}.parquet", _rows(name)) for name in SPLITS}


def respond(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """As the policy to a turn with a picture, which says what to say; as a strict judge to plain text."""
    content = body["messages"][-1]["content"]
    if isinstance(content, list):
        text = " ".join(part["text"] for part in content if part["type"] == "text")
        found = _SAY.search(text)
        said = RESPONSE.format(answer=found[1] if found else "B")
    else:
        said = _judged(content)
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return (
        200,
        {},
        {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"]} | answer(said, usage=usage),
    )


def _judged(prompt: str) -> str:
    if prompt.rstrip().endswith("Extracted answer:"):  # MathVista: the letter
        return prompt.rstrip().split("\n\n")[-2]
    compared = re.search(r"Reference answer: (\w+).*\nPrediction answer:(.*)\nOutput:", prompt, re.DOTALL)
    if compared:  # HallusionBench
        return "correct" if compared[1] == compared[2] else "incorrect"
    pair = re.search(r"Ground Truth Answer:\n```\n(.*?)\n```\nModel Prediction:\n```\n(.*?)\n```", prompt, re.DOTALL)
    assert pair is not None, f"a judge is asked what this one does not know: {prompt}"
    return str(int(pair[1] == pair[2]))  # MathVerse


def _rows(name: str) -> list[dict[str, Any]]:
    letters = ("B", "B", "B", "E") if name == "wemath" else ("B", "E")
    return [_row(name, at, letter) for at, letter in enumerate(letters)]


def _row(name: str, at: int, say: str) -> dict[str, Any]:
    """The fields that lmms-eval 0.7.3 reads; the right answer is B, or its text."""
    asked = f"How many are there? [say {say}]"
    if name == "mathvista":
        about = dict.fromkeys(("language", "source", "category", "task", "context", "grade"), "x")
        return {"pid": str(at), "question": asked, "decoded_image": _picture(), "choices": ["one", "two", "three"],
                "unit": "", "precision": 1.0, "answer": "two", "question_type": "multi_choice", "answer_type": "text",
                "query": asked, "metadata": {**about, "split": "testmini", "skills": ["x"]}}  # fmt: skip
    if name == "mathverse":
        return {"sample_index": str(at), "problem_index": str(at), "problem_version": "Vision Only", "question": asked,
                "image": _picture(), "answer": "B", "question_type": "multi-choice", "metadata": {"split": "testmini"},
                "query_wo": asked, "query_cot": asked, "question_for_eval": asked}  # fmt: skip
    if name == "mathvision":
        return {"id": str(at), "question": asked, "options": ["one", "two", "three", "four", "five"],
                "decoded_image": _picture(), "answer": "B"}  # fmt: skip
    if name == "wemath":
        key = ("2steps_1", "2steps_2", "2steps_multi", "3steps_1")[at]
        return {"ID": "0", "split": "testmini", "knowledge concept": "x", "question": asked, "answer": "B", "key": key,
                "option": "A. one; B. two; C. three; D. four; E. five", "image_path": _picture(),
                "question number": at, "knowledge concept description": "x"}  # fmt: skip
    if name == "hallusion":
        said = "No" if at == 0 else "Yes"
        return {"category": "VD", "subcategory": "figure", "set_id": "0", "figure_id": str(at), "question_id": "0",
                "question": f"Is it one? [say {said}]", "gt_answer": "0", "gt_answer_details": "No, it is two.",
                "visual_input": "1", "image": _picture()}  # fmt: skip
    seen = {"subject": "Art", "options": _OPTIONS, "answer": "B"}
    if name == "mmmu_pro_vision":  # the question is in the picture, and B is always said
        return {**seen, "id": f"test_Art_{at}", "image": _picture(), "answer": "B" if at == 0 else "D"}
    return {**seen, "id": f"validation_Art_{at}", "question": f"<image 1> {asked}", "image_1": _picture(),
            "question_type": "multiple-choice"}  # fmt: skip


def _picture() -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "orange").save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": "made.png"}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    features = {name: _feature(value) for name, value in rows[0].items()}
    table = pa.Table.from_pylist([dict(row) for row in rows])
    described = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": described}), path)
    return path


def _feature(value: Any) -> dict[str, Any]:
    """How the library ``datasets`` names the type of a column."""
    if isinstance(value, dict):
        is_image = set(value) == {"bytes", "path"}
        return {"_type": "Image"} if is_image else {name: _feature(one) for name, one in value.items()}
    if isinstance(value, list):
        return {"_type": "List", "feature": _feature(value[0])}
    return {"_type": "Value", "dtype": {str: "string", int: "int64", float: "float64"}[type(value)]}
