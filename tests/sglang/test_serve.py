"""``tools/serve.py`` against a real server: a converted checkpoint answers an OpenAI-style request about an image."""

from __future__ import annotations

import base64
import io
import threading
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.tools.convert import ToMegatronConfig
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.jobs.convert import to_megatron
from prism_megatron.jobs.serve import API_KEY, serve
from prism_megatron.rollout.sglang.arguments import PYTHON
from prism_megatron.rollout.sglang.http import ServerClient
from tests.sglang.conftest import FOLDER, REPOSITORY, picture
from tests.unit.jobs.test_serve import free_port

KEY = "a key of this test"


def question() -> dict[str, Any]:
    """One user turn with a picture, to be answered greedily."""
    buffer = io.BytesIO()
    picture(1, 96, 96).save(buffer, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many red circles?"}]
    return {
        "model": "mini",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 16,
    }


def test_a_checkpoint_answers_about_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the endpoint takes an image and a question, and answers with text under the name that was given.

    Blind to whether the answer is any good: log-probs of the same servers are held to ours in ``test_real_server``.
    """
    monkeypatch.setenv(API_KEY, KEY)
    checkpoint, port = tmp_path / "checkpoint", free_port()
    to_megatron(
        ToMegatronConfig(
            hf=str(FOLDER),
            save=str(checkpoint),
        ),
        say=print,
    )
    stop, answers = threading.Event(), []

    def say(text: str) -> None:
        if text.startswith("serving"):
            client = ServerClient(f"http://127.0.0.1:{port}", api_key=KEY)
            answers.append(client.post("/v1/chat/completions", question()))
            client.close()
            stop.set()

    config = ServeConfig(
        load=str(checkpoint),
        name="mini",
        port=port,
        context_length=1024,
        sglang_python=REPOSITORY / PYTHON,
        logs=tmp_path / "logs",
    )
    serve(config, say=say, stop=stop)
    (answer,) = answers
    assert answer["model"] == "mini"
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 16
