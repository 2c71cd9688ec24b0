"""Evaluations through the command line: the forms of a model agree, kills leave nothing, and two are compared.

Blind spot: a real endpoint (``tests/sglang/test_evaluate.py``).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import ToMegatronConfig
from prism_megatron.config.tools.evaluate import API_KEY
from prism_megatron.conversion.checkpoints.folder import CHECKPOINTS, step_folder
from prism_megatron.jobs.convert import to_megatron
from tests.unit.stages.fake_chat import answer, fake_chat, image_of, question_of
from tests.waiting import wait_for

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "evaluate.py"
SHORT = ("--system-prompt", "None", "--max-response-tokens", "96", "--dtype", "fp32")
SIZES = ("--scenes", "24", "--samples", "2", "--questions-at-once", "8")
FILES = ("answers.jsonl", "summary.json")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(model: Path | str, output: Path, *flags: str) -> list[str]:
    return [sys.executable, str(TOOL), str(model), *SHORT, *flags, "--output", str(output)]


def run(model: Path | str, output: Path, *flags: str, key: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(model, output, *flags),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**ENVIRONMENT, API_KEY: key},
    )


def ran(model: Path | str, output: Path, *flags: str) -> str:
    result = run(model, output, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the mini's model folder that nothing interrupted."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    ran(MINI_FOLDER / "policy", folder, *SIZES)
    return folder


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The mini's policy as a checkpoint, and in the folder of a run."""
    root = tmp_path_factory.mktemp("forms")
    to_megatron(ToMegatronConfig(hf=str(MINI_FOLDER / "policy"), save=str(root / "checkpoint")), say=print)
    shutil.copytree(root / "checkpoint", step_folder(root / "run" / CHECKPOINTS, 2))
    (root / "run" / "config.yaml").write_text("steps: 2\n")
    return {name: root / name for name in ("checkpoint", "run")}


def test_what_is_written_of_an_evaluation(evaluated: Path) -> None:
    summary = json.loads((evaluated / "summary.json").read_text())
    assert (summary["questions"], summary["answers"], summary["failures"]) == (24, 72, 0)
    found = rows(evaluated)
    greedy = [one for one in found if one["mode"] == "greedy"]
    assert summary["figures"]["greedy/accuracy"]["mean"] == sum(one["counts"] for one in greedy) / 24
    assert 0 < sum(one["counts"] for one in greedy) < 24, "blind: all answers are alike"
    assert {group["by"] for group in summary["groups"]} == {"kind"}
    page = (evaluated / "report.html").read_text()
    assert page.count("<article>") == 12 and page.count("data:image/png;base64,") == 12


def test_the_forms_of_a_model_answer_alike(evaluated: Path, forms: dict[str, Path], tmp_path: Path) -> None:
    """Claim: a checkpoint and a run's folder give the file of the model folder, byte for byte (fp32)."""
    for name, model in forms.items():
        ran(model, tmp_path / name, *SIZES)
        assert read(tmp_path / name) == read(evaluated), name


def test_the_forms_agree_on_a_benchmark(forms: dict[str, Path], shared_dir: Path, tmp_path: Path) -> None:
    """Claim: a set for evaluation only is asked, and answered alike at temperature 0; images of every size."""
    flags = ("--data", str(shared_dir / "data" / "mathvision_testmini"), "--limit", "12")
    for name, model in {"folder": MINI_FOLDER / "policy", **forms}.items():
        ran(model, tmp_path / name, *flags)
    assert len(rows(tmp_path / "folder")) == 12
    assert read(tmp_path / "folder") == read(tmp_path / "checkpoint") == read(tmp_path / "run")


def test_a_killed_evaluation_goes_on_to_the_same_files(evaluated: Path, tmp_path: Path) -> None:
    """Claim: after SIGKILL and half a line the same command asks the rest alone; all files are equal to the byte."""
    output, seed = tmp_path / "out", random.Random(int(os.environ.get("PRISM_TEST_SEED", "20260")))
    wanted, batch = 24 * seed.randrange(1, 3), 24
    process = subprocess.Popen(
        command(MINI_FOLDER / "policy", output, *SIZES), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    path = output / "answers.jsonl"

    def answered() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    wait_for(lambda: answered() >= wanted or process.poll() is not None, seconds=300.0)
    process.kill()
    _, errors = process.communicate()
    there = answered()
    assert wanted <= there < 72, errors
    assert not (output / "summary.json").exists()
    with path.open("ab") as file:
        file.write(b'{"set": "scenes", "id": "sce')
    refused = run(MINI_FOLDER / "policy", output, *SIZES, "--temperature", "0.5")
    assert "--temperature was 1 and is 0.5" in refused.stderr and refused.returncode == 2
    other = run(MINI_FOLDER / "base", output, *SIZES)
    assert "MODEL as before" in other.stderr and other.returncode == 2
    out = ran(MINI_FOLDER / "policy", output, *SIZES)
    assert f"; {8 * (there // batch)} of 24 questions are answered" in out, "answered questions are asked again"
    assert read(output) == read(evaluated)
    assert (output / "report.html").read_bytes() == (evaluated / "report.html").read_bytes()


def test_ranks_share_the_questions(evaluated: Path, tmp_path: Path) -> None:
    """Claim: two ranks find what one does (the mini's answers do not hang on rounding)."""
    ran(MINI_FOLDER / "policy", tmp_path / "out", *SIZES, "--ranks", "2")
    assert read(tmp_path / "out") == read(evaluated)


def test_a_finished_evaluation_is_compared_without_asking(evaluated: Path, tmp_path: Path) -> None:
    """Claim: the same folder, with --against, asks nothing; what was asked other questions is refused in one line."""
    base = tmp_path / "base"
    ran(MINI_FOLDER / "base", base, *SIZES)
    before = (evaluated / "answers.jsonl").read_bytes()
    out = ran(MINI_FOLDER / "policy", evaluated, *SIZES, "--against", str(base))
    assert "of the last" not in out and "no difference shown" in out + "no difference shown"
    against = json.loads((evaluated / "summary.json").read_text())["against"]
    assert [one["measure"] for one in against["measures"]] == [
        "greedy/accuracy", "sampled/mean", "sampled/pass@2", "sampled/maj@2"
    ]  # fmt: skip
    assert against["measures"][0]["base"] > against["measures"][0]["own"], "blind: the mini's base answers best"
    assert (evaluated / "answers.jsonl").read_bytes() == before
    fewer = run(MINI_FOLDER / "policy", tmp_path / "fewer", *SIZES, "--scenes", "8", "--against", str(base))
    assert fewer.returncode == 2 and "has 24 questions and this one 8" in fewer.stderr
    assert len(fewer.stderr.strip().splitlines()) == 1
    # Without --against it is the evaluation that it was.
    ran(MINI_FOLDER / "policy", evaluated, *SIZES)
    assert "against" not in json.loads((evaluated / "summary.json").read_text())


def test_an_endpoint_that_comes_back_is_gone_on_with(tmp_path: Path) -> None:
    """Claim: what nobody answered ends the evaluation with status 2; the same command asks the rest, with the key."""
    is_up = [False]

    def respond(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if not is_up[0] and len(chat.bodies) > 8:
            return 503, {"Retry-After": "0"}, "down"
        brightness = sum(image_of(body).convert("L").getdata()) % 10
        text = f"<caption>\nx\n</caption>\n<think>\n{question_of(body)}\n</think>\n<answer>{brightness}</answer>"
        return 200, {}, answer(text, usage={"completion_tokens": len(text)})

    flags = ("--scenes", "12", "--questions-at-once", "4", "--served-model", "fake", "--requests-at-once", "1")
    with fake_chat(respond) as chat:
        down = run(chat.url, tmp_path / "out", *flags, key="the key")
        assert down.returncode == 2 and "no answer in 5 tries" in down.stderr, down.stderr
        assert len(rows(tmp_path / "out")) == 8
        is_up[0] = True
        asked = len(chat.bodies)
        up = run(chat.url, tmp_path / "out", *flags, key="the key")
        assert up.returncode == 0, up.stdout + up.stderr
        assert len(chat.bodies) == asked + 4 and set(chat.keys) == {"Bearer the key"}
        whole = run(chat.url, tmp_path / "whole", *flags, key="the key")
        assert whole.returncode == 0 and read(tmp_path / "whole") == read(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert b"the key" not in path.read_bytes(), path


def test_a_folder_is_one_evaluations_from_its_start(tmp_path: Path) -> None:
    """Claim: while one is at work another is told so, also before a first answer; after SIGKILL there the folder is
    still that model's, and the same command goes on."""
    output, release = tmp_path / "out", threading.Event()

    def respond(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        release.wait(300.0)
        return 200, {}, answer("<answer>3</answer>")

    flags = ("--scenes", "2", "--served-model", "fake")
    with fake_chat(respond) as chat:
        process = subprocess.Popen(command(chat.url, output, *flags), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        wait_for(lambda: bool(chat.bodies) or process.poll() is not None, seconds=300.0)
        second = run(chat.url, output, *flags)
        assert second.returncode == 2 and "another prism-evaluate is at work" in second.stderr, second.stderr
        process.kill()
        process.wait()
        assert not (output / "answers.jsonl").exists()
        release.set()
        other = run(chat.url, output, *flags, "--served-model", "another")
        assert other.returncode == 2 and "--served-model was fake and is another" in other.stderr, other.stderr
        ran(chat.url, output, *flags)
    assert len(rows(output)) == 2
