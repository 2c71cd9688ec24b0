"""A model to compare with is asked the same first, by an evaluation like any other.

Blind spot: the verdict (``tests/unit/evaluation/benchmark/test_paired.py``) and several ranks.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands.evaluate import parse
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError, RunStopped
from prism_megatron.run.session import Session
from prism_megatron.stages.evaluate import ask, build
from prism_megatron.stages.evaluate.build import evaluate_on
from tests.unit.stages.fake_chat import answer, fake_chat

BASE, POLICY = str(MINI_FOLDER / "base"), str(MINI_FOLDER / "policy")
ASK = ["--scenes", "8", "--system-prompt", "None", "--max-response-tokens", "96", "--dtype", "fp32",
       "--questions-at-once", "4"]  # fmt: skip


def evaluate(world: World, model: str, output: Path, *flags: str) -> dict[str, Any]:
    """The summary of an evaluation."""
    evaluate_on(world, parse([model, *ASK, "--output", str(output), *flags]))
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def apart(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both evaluations by themselves, the second compared with the folder of the first."""
    folder = tmp_path_factory.mktemp("apart")
    evaluate(world, BASE, folder / "base")
    evaluate(world, POLICY, folder / "own", "--against", str(folder / "base"))
    return folder


def same_answers(folder: Path, apart: Path) -> bool:
    return all(
        (folder / below / "answers.jsonl").read_bytes() == (apart / name / "answers.jsonl").read_bytes()
        for name, below in (("base", "against"), ("own", ""))
    )


def measures(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text())["against"]["measures"]


def test_a_model_is_asked_the_same_and_compared_with(world: World, apart: Path, tmp_path: Path) -> None:
    """Claim: answers and comparison are those of two evaluations apart; again, the same command asks nothing; and after
    a kill in either of the two it asks the rest."""
    out = tmp_path / "out"
    evaluate(world, POLICY, out, "--against", BASE)
    assert same_answers(out, apart) and measures(out) == measures(apart / "own")
    assert measures(out)[0]["base"] != measures(out)[0]["own"], "blind: both answer alike"
    assert json.loads((out / "against" / "begun.json").read_text())["config"]["against"] is None
    for killed in ("against", "."):
        lines = (out / killed / "answers.jsonl").read_text().splitlines(keepends=True)
        (out / killed / "answers.jsonl").write_text("".join(lines[:5]))
        (out / killed / "summary.json").unlink()
        evaluate(world, POLICY, out, "--against", BASE)
        assert same_answers(out, apart) and measures(out) == measures(apart / "own")


def test_another_model_does_not_take_the_place_of_the_first(world: World, apart: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(world, POLICY, out, "--against", BASE)
    other = str(MINI_FOLDER / "aligned")
    with pytest.raises(
        ConfigError, match=r"--against .*aligned: .*out/against was begun otherwise: .*in another --out"
    ):
        evaluate(world, POLICY, out, "--against", other)
    evaluate(world, POLICY, out, "--against", str(apart / "base"))
    assert measures(out) == measures(apart / "own")


@pytest.mark.parametrize("batches", [1, 2])
def test_a_wish_to_stop_while_the_other_model_is_asked_is_heard(
    batches: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: also during its last questions; what is said names the folder that the same command goes on with."""
    asked: list[Session] = []

    def ask_all(*arguments: Any, **named: Any) -> Any:
        session = arguments[4]
        asked.append(session)
        if batches == 1:
            signal.raise_signal(signal.SIGTERM)
            return ask.ask_all(*arguments, **named)
        found = ask.ask_all(*arguments, **named)
        signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(build, "ask_all", ask_all)
    out = tmp_path / "out"
    after = "0 of 8 questions" if batches == 1 else "the last question"
    with pytest.raises(
        RunStopped, match=rf"^--against .*base: stopped by SIGTERM after {after}; .*--output .*out goes on"
    ):
        evaluate(world, POLICY, out, "--against", BASE)
    assert len(asked) == 1 and not (out / "answers.jsonl").exists()


def test_an_endpoint_is_compared_with_a_model_that_is_loaded(world: World, apart: Path, tmp_path: Path) -> None:
    """Claim: what is of the endpoint alone is not asked of the model, and told beside the verdict."""
    said = "<caption>\nx\n</caption>\n<think>\ny\n</think>\n<answer>3</answer>"
    with fake_chat(lambda _body: (200, {}, answer(said))) as chat:
        found = evaluate(world, chat.url, tmp_path / "out", "--served-model", "fake", "--request-fields",
                         '{"top_k": -1}', "--against", BASE)  # fmt: skip
        assert len(chat.bodies) == 8
    assert (tmp_path / "out" / "against" / "answers.jsonl").read_bytes() == (
        apart / "base" / "answers.jsonl"
    ).read_bytes()
    assert any("--request-fields was None" in note for note in found["against"]["notes"])
