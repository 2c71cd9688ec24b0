"""Servers that answer in the form that is asked for: the fake of ``tests/unit/rollout`` with texts of its own."""

from __future__ import annotations

import json
from pathlib import Path

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from tests.unit.rollout.served_fake import fake_python

ANSWERS = "answers.json"
_TEXTS = (
    "<caption>There is one red circle.</caption> <think>I count one.</think> <answer>1</answer>",
    "<caption>There are two blue squares.</caption> <think>I count one, then two.</think> <answer>2</answer>",
    "<caption>There is nothing.</caption> <think>I count none.</think> <answer>0</answer>",
)
_LAUNCH = """
import itertools, json, pathlib, sys, threading
from dataclasses import replace

from tests.unit.rollout import fake_sglang
from tests.unit.rollout.fake_sglang import FakeSGLang, running

ANSWERS = json.loads((pathlib.Path(__file__).parents[2] / "answers.json").read_text())


COUNT = itertools.count()


class Answering(FakeSGLang):
    def sample(self, *request):
        return FakeSGLang.sample(replace(self, tokens=tuple(ANSWERS[next(COUNT) % len(ANSWERS)])), *request)


arguments = json.load(open(sys.argv[sys.argv.index("--config") + 1]))
fake_sglang.KEY = arguments["api-key"]
fake_sglang.FakeSGLang = Answering
with running(498, host=arguments["host"], port=arguments["port"]):
    threading.Event().wait()  # until it is killed
"""


def answering_python(folder: Path) -> Path:
    """An interpreter in ``folder`` whose ``sglang`` serves these texts, one after the other."""
    from prism_megatron.data.render import Renderer

    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    tokens = [[*renderer.tokenizer.encode(text, add_special_tokens=False), renderer.end_token_id] for text in _TEXTS]
    python = fake_python(folder)
    (folder / ANSWERS).write_text(json.dumps(tokens))
    (folder / "fake" / "sglang" / "launch_server.py").write_text(_LAUNCH)
    return python
