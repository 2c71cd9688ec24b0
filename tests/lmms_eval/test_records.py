"""lmms-eval's own client and ``prism-evaluate`` ask one endpoint, and the model folder, the same questions.

The harness shares no code with ours: it has its own reader of the set, its own client, and ``records.py`` its own rule.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.data.scenes import make_scene
from prism_megatron.jobs.serve import API_KEY, serve
from prism_megatron.rollout.sglang.arguments import PYTHON as SGLANG_PYTHON
from prism_megatron.stages.evaluate.said import until_it_goes_on
from prism_megatron.testing import GlooWorld
from tests.lmms_eval.harness import FAILED, REPOSITORY, Harness, said
from tests.sglang.test_evaluate import KEY, evaluated, rows
from tests.unit.jobs.test_serve import free_port

pytestmark = pytest.mark.slow

MODEL = MINI_FOLDER / "aligned"
NUM_QUESTIONS = 48
SYSTEM = "Answer."
"""One that the mini was not trained with, under which it forgets the form now and then and is right now and then."""
TOKENS = "96"


def write_set(folder: Path, count: int) -> None:
    """Scenes as records; their pictures in turn plain, of a size that has to be changed, transparent, and indexed."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(count):
        scene = make_scene("heldout", seed=42, index=index)
        _disguised(scene.image(), index % 4).save(folder / "images" / f"{index}.png")
        kind = "integer" if scene.answer.lstrip("-").isdigit() else "text"
        lines.append({"id": f"q{index}", "image": f"images/{index}.png", "question": scene.question.text,
                      "choices": None, "answer": scene.answer, "answer_type": kind, "solution": None, "caption": None,
                      "source": "made/scenes"})  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _disguised(picture: Image.Image, way: int) -> Image.Image:
    if way == 1:
        return picture.resize((150, 131))
    if way == 2:
        picture.putalpha(Image.new("L", picture.size, 255))
        picture.paste((0, 0, 0, 0), (0, 0, picture.width, 4))  # black where nobody sees it
    return picture.quantize(64) if way == 3 else picture


def test_the_harness_finds_what_prism_evaluate_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sglang_installed: None
) -> None:
    """Claim: at temperature 0 and in fp32 each of 48 questions has one text and one verdict, whether lmms-eval asks
    ``prism-serve``, ``prism-evaluate`` asks it, or the folder is loaded; no request of lmms-eval's fails.

    lmms-eval sends no system prompt and ``prism-evaluate`` does: ``--system-prompt`` of the server puts it in.

    Blind to bf16, in which two engines round otherwise, and to answers that only our rules take for right.
    """
    monkeypatch.setenv(API_KEY, KEY)
    data, port, stop = tmp_path / "set", free_port(), threading.Event()
    write_set(data, NUM_QUESTIONS)
    url = f"http://127.0.0.1:{port}/v1"
    harness = Harness(url, KEY, "mini", tmp_path / "harness")
    flags = ["--data", str(data), "--system-prompt", SYSTEM, "--max-response-tokens", TOKENS, "--dtype", "fp32"]
    logged: list[dict[str, Any]] = []

    def say(text: str) -> None:
        if text.startswith("serving"):
            try:
                logged.extend(
                    harness.run("prism_records", cwd=data, flags=["--gen_kwargs", f"max_new_tokens={TOKENS}"])[
                        "prism_records"
                    ]
                )
                with GlooWorld(1) as gloo:
                    served = [url, "--served-model", "mini", "--output", str(tmp_path / "served")]
                    gloo.run(evaluated, [*served, *flags])
                    gloo.run(evaluated, [str(MODEL), *flags, "--output", str(tmp_path / "loaded")])
            finally:
                stop.set()

    serve(
        ServeConfig(load=str(MODEL), name="mini", port=port, system_prompt=SYSTEM, logs=tmp_path / "logs",
                    sglang_python=REPOSITORY / SGLANG_PYTHON),
        say=say,
        stop=stop,
    )  # fmt: skip
    figures = harness.results("prism_records")["prism_records"]
    _agree(logged, rows(tmp_path / "served"), rows(tmp_path / "loaded"))
    assert figures["failed,none"] == 0.0
    assert figures["right,none"] == sum(line["right"] for line in logged) / NUM_QUESTIONS


def _agree(logged: Sequence[dict[str, Any]], *evaluations: Sequence[dict[str, Any]]) -> None:
    """Says how many of what are equal, and then that it is all of them. Evaluations: served, loaded."""
    assert {len(logged), *map(len, evaluations)} == {NUM_QUESTIONS}
    assert [line["input_media"] for line in logged] == [[f"images/{index}.png"] for index in range(NUM_QUESTIONS)]
    texts = [until_it_goes_on(said(line)) for line in logged]
    whole = sum(text == said(line) for text, line in zip(texts, logged, strict=True))
    failed = sum(FAILED in said(line) for line in logged)
    right = sum(line["right"] for line in logged)
    print(f"\nlmms-eval: {NUM_QUESTIONS} questions, {failed} failed requests, {right:.0f} right, "
          f"{whole} texts that need no cut after their answer")  # fmt: skip
    for name, ours in zip(("served", "loaded"), evaluations, strict=True):
        pairs = list(zip(logged, texts, ours, strict=True))
        same = {
            "texts": sum(one["text"] == text for _, text, one in pairs),
            "verdicts": sum(one["counts"] == bool(line["right"]) for line, _, one in pairs),
            "verdicts in any form": sum(one["right"] == bool(line["right_in_any_form"]) for line, _, one in pairs),
        }
        for what, count in same.items():
            print(f"prism-evaluate, {name}: {count} of {NUM_QUESTIONS} {what} equal")
        assert set(same.values()) == {NUM_QUESTIONS}, name
    assert failed == 0
    assert 0 < right < NUM_QUESTIONS, "blind: all answers are alike"
    assert 0 < sum(one["valid"] for one in evaluations[0]) < NUM_QUESTIONS, "blind: all answers have one form"
