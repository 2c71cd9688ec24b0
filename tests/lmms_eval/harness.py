"""lmms-eval as its users run it: a process in its own environment that asks an endpoint, and what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-lmms" / "bin" / "python"
TASKS = REPOSITORY / "examples" / "evaluation" / "lmms_eval"
FAILED = "[LMMS_EVAL_REQUEST_FAILED"
_SECONDS = 900.0
"""It takes half a minute on two free cores, most of it imports, and minutes where they are shared."""


def said(line: Mapping[str, Any]) -> str:
    """The answer of a logged sample as it came, which is logged once where nothing was taken out of it."""
    came = line.get("resps", line["filtered_resps"])
    (text,) = came if isinstance(came, list) else [came]
    assert isinstance(text, str)
    return text


@dataclass(frozen=True)
class Harness:
    """One way to run it: where requests go, and the folder for its caches, results and log."""

    url: str
    key: str
    model: str
    folder: Path
    judge_url: str | None = None

    def run(
        self, task: str, *, include: Path = TASKS, cwd: Path | None = None, flags: Sequence[str] = ()
    ) -> dict[str, list[dict[str, Any]]]:
        """The logged samples of every task by its name, in the order of the questions. A run that fails fails the test.

        ``OPENAI_API_URL`` is where its judges ask.
        """
        output = self.folder / task
        output.mkdir(parents=True)
        model = f"model_version={self.model},base_url={self.url},api_key={self.key},num_concurrent=8,max_retries=2"
        command = [str(PYTHON), "-m", "lmms_eval", "--model", "openai", "--model_args", model, "--include_path",
                   str(include), "--tasks", task, "--batch_size", "1", "--log_samples", "--output_path", str(output),
                   *flags]  # fmt: skip
        log = output / "log.txt"
        with log.open("wb") as out:
            done = subprocess.run(
                command, cwd=cwd, env=self._environment(), stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, timeout=_SECONDS, check=False,
            )  # fmt: skip
        told = log.read_text(encoding="utf-8", errors="replace")
        print("\n".join(["", *(line for line in told.splitlines() if line.startswith("|"))]))  # its tables
        found = {}
        for path in output.rglob("*_samples_*.jsonl"):
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[path.stem.partition("_samples_")[2]] = sorted(lines, key=lambda line: int(line["doc_id"]))
        # It ends in 0 after an error too, and has then logged nothing.
        assert done.returncode == 0 and found, told[-4000:]
        return found

    def results(self, task: str) -> dict[str, dict[str, Any]]:
        """The figures of every task that the run of ``task`` wrote."""
        (path,) = (self.folder / task).rglob("*_results.json")
        results: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
        return results

    def _environment(self) -> Mapping[str, str]:
        """This process's, without its Python; nothing is asked of a hub."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        kept |= {"HF_HOME": str(self.folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
        return kept | {"OPENAI_API_KEY": self.key, "OPENAI_API_URL": self.judge_url or self.url}
