"""``prism-evaluate`` of an endpoint that ``prism-serve`` serves: the same answers as of the model that is loaded."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands.evaluate import parse
from prism_megatron.config.tools.evaluate import API_KEY as ASKED_WITH
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.engine.runtime import World
from prism_megatron.jobs.serve import API_KEY, serve
from prism_megatron.rollout.sglang.arguments import PYTHON
from prism_megatron.stages.evaluate.build import evaluate_on
from prism_megatron.testing import GlooWorld
from tests.sglang.conftest import FOLDER, REPOSITORY
from tests.unit.jobs.test_serve import free_port

KEY = "a key of this test"


def evaluated(world: World, words: list[str]) -> None:
    os.environ[ASKED_WITH] = KEY  # a fork server may have begun without it
    evaluate_on(world, parse(words))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_an_endpoint_answers_as_the_loaded_model_does(
    tmp_path: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: at temperature 0 and in fp32 every text and verdict is the same; every prompt is as long as ours.

    Lengths may differ where an answer goes on after its end: the server samples on, and both are cut there. Tokens are
    counted alike elsewhere. Blind to bf16, in which two engines round otherwise.
    """
    monkeypatch.setenv(API_KEY, KEY)
    port, stop = free_port(), threading.Event()
    records = str(shared_dir / "data" / "mathvision_testmini")
    flags = ["--data", records, "--limit", "24", "--scenes", "24", "--system-prompt", "None", "--max-response-tokens",
             "96", "--dtype", "fp32", "--questions-at-once", "24"]  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    served = [url, "--served-model", "mini", "--served-files", str(FOLDER)]

    def say(text: str) -> None:
        if text.startswith("serving"):
            try:
                with GlooWorld(1) as gloo:
                    gloo.run(evaluated, [*served, *flags, "--output", str(tmp_path / "served")])
                    gloo.run(evaluated, [str(FOLDER), *flags, "--output", str(tmp_path / "loaded")])
            finally:
                stop.set()

    config = ServeConfig(
        load=str(FOLDER), name="mini", port=port, sglang_python=REPOSITORY / PYTHON, logs=tmp_path / "logs"
    )
    serve(config, say=say, stop=stop)
    ours, theirs = rows(tmp_path / "loaded"), rows(tmp_path / "served")
    assert len(ours) == len(theirs) == 48
    for own, other in zip(ours, theirs, strict=True):
        lengths = own.pop("tokens"), other.pop("tokens")
        assert own == other
        assert own["problem"] or lengths[0] == lengths[1]
    assert 0 < sum(one["counts"] for one in ours) < 48, "blind: all answers are alike"
