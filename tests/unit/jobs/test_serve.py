"""``tools/serve.py``: what is served, under which name and key, and what is refused.

A stub stands in for SGLang; ``tests/sglang/test_serve.py`` asks a real server for an answer.
"""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import ToMegatronConfig
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.errors import ConfigError
from prism_megatron.jobs.convert import to_megatron
from prism_megatron.jobs.serve import API_KEY, serve
from tests.mini_experts import write_mini_with_experts
from tests.unit.rollout.stub_sglang import stub_python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("has_experts", [False, True], ids=["dense", "experts"])
def test_a_checkpoint_is_served_and_nothing_is_left(
    has_experts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: the policy of a checkpoint is served as a model folder under the checkpoint's name, with the key of the
    environment, on the port that was asked for; the folder and the server are gone afterwards.

    Experts that came fused as SGLang does not read them are in it one by one."""
    policy, expected = MINI_FOLDER / "policy", MINI_FOLDER / "policy"
    if has_experts:
        policy = write_mini_with_experts(tmp_path / "fused", "transformers")
        expected = write_mini_with_experts(tmp_path / "single", "per_expert")
    monkeypatch.setenv(API_KEY, "of the environment")
    checkpoint, logs, port = tmp_path / "step_000007", tmp_path / "logs", free_port()
    to_megatron(ToMegatronConfig(hf=str(policy), save=str(checkpoint)), say=print)
    stop, said, served = threading.Event(), [], {}

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("serving"):
            served.update(json.loads((logs / "server-0.yaml").read_text()))
            served["files"] = sorted(path.name for path in Path(served["model-path"]).iterdir())
            served["weights"] = HFFolder(served["model-path"]).names()
            stop.set()

    serve(
        ServeConfig(load=str(checkpoint), port=port, sglang_python=stub_python(tmp_path), logs=logs), say=say, stop=stop
    )
    assert served["served-model-name"] == "step_000007"
    assert served["api-key"] == "of the environment"
    assert (served["host"], served["port"]) == ("127.0.0.1", port)
    assert served["dtype"] == json.loads((MINI_FOLDER / "policy" / "config.json").read_text())["dtype"]
    assert served["weights"] == HFFolder(expected).names()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(served["files"])
    assert f"serving 'step_000007' at http://127.0.0.1:{port}/v1" in said
    assert not Path(served["model-path"]).exists()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_a_system_prompt_is_served_and_nothing_is_left(tmp_path: Path) -> None:
    """Claim: with --system-prompt the server reads a folder whose template brings it, under the model's own name; the
    folder goes with the server, and the model's own files stay as they are."""
    logs, stop, served = tmp_path / "logs", threading.Event(), {}

    def say(text: str) -> None:
        if text.startswith("serving"):
            served.update(json.loads((logs / "server-0.yaml").read_text()))
            served["template"] = (Path(served["model-path"]) / "chat_template.jinja").read_text()
            served["weights"] = (Path(served["model-path"]) / "model.safetensors").resolve()
            stop.set()

    policy = MINI_FOLDER / "policy"
    before = (policy / "chat_template.jinja").read_text()
    config = ServeConfig(load=str(policy), port=free_port(), sglang_python=stub_python(tmp_path), logs=logs,
                         system_prompt="Answer.")  # fmt: skip
    serve(config, say=say, stop=stop)
    assert served["template"] != before and served["template"].endswith(before) and "'Answer.'" in served["template"]
    assert served["weights"] == (policy / "model.safetensors").resolve()
    assert served["served-model-name"] == "policy"
    assert not Path(served["model-path"]).exists() and not list(logs.glob("prompting-*"))
    assert (policy / "chat_template.jinja").read_text() == before and (policy / "model.safetensors").is_file()


def test_what_cannot_be_served_is_told_first(tmp_path: Path) -> None:
    """Claim: a taken port, a discriminator, experts that SGLang would misread, no folder and a missing SGLang are each
    one clear error."""
    policy, python = str(MINI_FOLDER / "policy"), stub_python(tmp_path)

    def refused(match: str, **flags: object) -> None:
        config = ServeConfig(**({"load": policy, "port": free_port(), "sglang_python": python} | flags))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=match):
            serve(config, say=print, stop=threading.Event())

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused("cannot be used on 127.0.0.1", port=taken.getsockname()[1])
    refused("is a discriminator", load=str(MINI_FOLDER / "discriminator"))
    fused = write_mini_with_experts(tmp_path / "fused", "transformers")
    refused("fuses experts as transformers 5 does", load=str(fused))
    refused("is not a folder", load=str(tmp_path / "nowhere"))
    refused("make sglang", sglang_python=tmp_path / "absent")
    refused("--tp 0 must be at least 1", tp=0)
