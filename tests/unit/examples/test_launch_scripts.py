"""The scripts that clusters start: whom they tell of a signal, what their status says, when a job is queued again.

torchrun, Slurm's commands and SGLang are stand-ins; ``tests/integration/test_launched_run.py`` plays a real run. Blind
spot: what a real Slurm, kubelet or SkyPilot does with signals and statuses, which is taken from their documentation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.examples.recipes import EXAMPLES, bash, slurm, steps_of_job
from tests.waiting import wait_for

LAUNCH = EXAMPLES / "launch"
RUN_STAGE, SLURM_STAGE, SERVE = (LAUNCH / name for name in ("run_stage.sh", "slurm_stage.sh", "serve_policy.sh"))
SCRIPTS = sorted(path for pattern in ("*/*.sh", "*/*.sbatch") for path in EXAMPLES.glob(pattern))
DONE, STOPPED = '"ended": "done"', '"ended": "stopped by SIGTERM after step 3 of 9"'

# A launcher that starts one rank. The rank writes that it is there and each SIGTERM that it hears, and ends when it
# may, with the summary of a run that was asked to stop; the launcher leaves a file if a SIGTERM reaches it.
TORCHRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
output.mkdir(parents=True, exist_ok=True)
(output / "words").write_text("\\n".join(sys.argv[1:]))
mode = os.environ["MODE"]
if mode != "wait":
    if mode in ("done", "stopped"):
        (output / "summary.json").write_text('{{\\n  ' + os.environ["ENDED"] + '\\n}}\\n')
    sys.exit(int(mode == "failed"))
rank = "import os, signal, sys, time; from pathlib import Path; here = Path(sys.argv[1])\\n" \\
    "signal.signal(signal.SIGTERM, lambda *_: print('TERM', file=(here / 'heard').open('a')))\\n" \\
    "(here / 'there').touch()\\n" \\
    "while not (here / 'may_end').exists(): time.sleep(0.01)\\n" \\
    "(here / 'summary.json').write_text(os.environ['ENDED'])"
signal.signal(signal.SIGTERM, lambda *_: (output / "launcher_heard").touch())
sys.exit(subprocess.Popen([sys.executable, "-c", rank, str(output)]).wait())
"""


@pytest.fixture
def torchrun(tmp_path: Path) -> dict[str, str]:
    """The environment of ``run_stage.sh`` with a stand-in for torchrun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "torchrun").write_text(TORCHRUN, encoding="utf-8")
    (folder / "torchrun").chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PET_"))}
    return {**clean, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "NPROC": "4", "ENDED": DONE, "MODE": "done"}


@contextmanager
def started(words: Sequence[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(words, start_new_session=True, **more)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_stage(environment: dict[str, str], output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RUN_STAGE), "warm_start", "own.yaml", str(output), *flags],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_is_one(path: Path) -> None:
    """Claim: bash can parse it, it may be executed (a job's script is read by sbatch), and it stops at what fails."""
    assert subprocess.run([bash(), "-n", str(path)], capture_output=True, check=False).returncode == 0
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shellcheck_finds_nothing(path: Path) -> None:
    """Claim: none of its complaints, down to those of style, stands against the script."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck is not None, "shellcheck is missing, which comes with the extra `dev`: pip install -e '.[dev]'"
    found = subprocess.run([shellcheck, str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_one_line_is_the_first_and_every_later_try(torchrun: dict[str, str], tmp_path: Path) -> None:
    """Claim: the tool gets the file, the folder, --resume auto and what follows; torchrun the place among the hosts."""
    output = tmp_path / "runs" / "warm"
    place = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "node-0", "MASTER_PORT": "1234", "MAX_MINUTES": "90"}
    assert run_stage(torchrun | place, output, "--steps", "3").returncode == 0
    words = (output / "words").read_text(encoding="utf-8").splitlines()
    tool = words.index("-m")
    assert words[tool:] == [
        "-m", "prism_megatron", "warm-start", "--config", "own.yaml", "--output", str(output), "--resume", "auto",
        "--max-minutes", "90", "--steps", "3",
    ]  # fmt: skip
    pairs = dict(zip(words[:tool:2], words[1:tool:2], strict=True))
    assert pairs == {
        "--nnodes": "3", "--nproc-per-node": "4", "--node-rank": "2", "--master-addr": "node-0",
        "--master-port": "1234", "--max-restarts": "0",
    }  # fmt: skip


def test_a_host_of_a_slurm_step_knows_its_place(torchrun: dict[str, str], tmp_path: Path) -> None:
    """Claim: without NODE_RANK it is the number of the task, one of which runs on a node; alone it is the first."""
    for environment, rank in (({"SLURM_PROCID": "5"}, "5"), ({}, "0")):
        output = tmp_path / f"run-{rank}"
        run_stage(torchrun | environment, output)
        words = (output / "words").read_text(encoding="utf-8").splitlines()
        assert words[words.index("--node-rank") + 1] == rank


@pytest.mark.parametrize(
    ("mode", "ended", "status"), [("done", DONE, 0), ("stopped", STOPPED, 3), ("failed", DONE, 1), ("begun", DONE, 3)]
)
def test_the_status_says_whether_to_go_on(
    mode: str, ended: str, status: int, torchrun: dict[str, str], tmp_path: Path
) -> None:
    """Claim: 0 is a run that is done, though torchrun ends with 0 where one was stopped, or wrote no summary, too."""
    result = run_stage(torchrun | {"MODE": mode, "ENDED": ended}, tmp_path / "run")
    assert result.returncode == status, result.stderr
    assert not (tmp_path / "run.pid").exists()


def test_the_first_host_alone_says_it(torchrun: dict[str, str], tmp_path: Path) -> None:
    """Claim: another host ends with 0, for it may end before the summary is written; a failure is everyone's."""
    for mode, status in (("stopped", 0), ("failed", 1)):
        place = {"NODE_RANK": "1", "MODE": mode, "ENDED": STOPPED}
        assert run_stage(torchrun | place, tmp_path / mode).returncode == status
        assert not (tmp_path / f"{mode}.pid").exists()


def test_a_signal_reaches_ranks_and_not_torchrun(torchrun: dict[str, str], tmp_path: Path) -> None:
    """Claim: SIGTERM to the process in OUTPUT.pid reaches the ranks, which end in their own time, with status 3;
    however often it comes, the script waits for them.
    """
    output = tmp_path / "run"
    heard = output / "heard"

    def heard_times(times: int) -> bool:
        return heard.exists() and heard.read_text(encoding="utf-8") == "TERM\n" * times

    environment = torchrun | {"MODE": "wait", "ENDED": STOPPED}
    with started([str(RUN_STAGE), "sft", "own.yaml", str(output)], env=environment) as script:
        wait_for((output / "there").exists)
        assert int((tmp_path / "run.pid").read_text(encoding="utf-8")) == script.pid
        for times in (1, 2):
            script.send_signal(signal.SIGTERM)
            wait_for(partial(heard_times, times), seconds=20)
        assert script.poll() is None
        (output / "may_end").touch()
        assert script.wait(timeout=60) == 3
    assert not (output / "launcher_heard").exists() and not (tmp_path / "run.pid").exists()


def job(home: Path, srun: str, *, output: Path, nodes: int = 2) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A job whose ``srun`` is this text."""
    environment = slurm(home, nodes=nodes)
    (home / "bin" / "srun").write_text(f"#!/usr/bin/env bash\n{srun}\n", encoding="utf-8")
    words = [bash(), str(SLURM_STAGE), "align", "own.yaml", str(output)]
    return started(words, env={**environment, "NPROC": "4"}, cwd=home)


@pytest.mark.parametrize(("status", "queued"), [(3, True), (0, False), (1, False)])
def test_a_job_is_queued_again_where_its_run_goes_on(status: int, queued: bool, tmp_path: Path) -> None:
    """Claim: a stage that stopped before its end is queued again; one that is done, or failed, is not."""
    with job(tmp_path, f"exit {status}", output=tmp_path / "run") as script:
        assert script.wait(timeout=60) == status
    log = tmp_path / "scontrol.log"
    assert (log.read_text(encoding="utf-8") if log.exists() else "") == ("requeue 4711\n" if queued else "")


def test_a_job_tells_its_run_of_the_time_limit(tmp_path: Path) -> None:
    """Claim: SIGTERM to the job's script reaches the first node's run_stage.sh alone, and a job that was told is queued
    again when its run has ended. A process id that a killed try has left is not signalled."""
    output = tmp_path / "run"
    step = (
        f"trap 'exit 3' TERM; while [[ -e {output}.pid ]]; do sleep 0.01; done; echo $$ >{output}.pid; "
        f"touch {output}.there; while :; do sleep 0.01; done"
    )
    with started([sys.executable, "-c", "import signal; signal.pause()"]) as innocent:
        Path(f"{output}.pid").write_text(str(innocent.pid), encoding="utf-8")
        with job(tmp_path, step, output=output) as script:
            wait_for(Path(f"{output}.there").exists, seconds=20)
            script.send_signal(signal.SIGTERM)
            assert script.wait(timeout=60) == 3
        assert (tmp_path / "scontrol.log").read_text(encoding="utf-8") == "requeue 4711\n"
        assert innocent.poll() is None


def test_nodes_that_serve_train_nothing(tmp_path: Path) -> None:
    """Claim: of 24 nodes of the 235B recipe 16 train; the others serve, are named to the run, and share its key."""
    served, trained = steps_of_job("slurm_235b", "align", tmp_path)
    trainers, servers = (
        next(word for word in step["words"] if word.startswith("--nodelist=")) for step in (trained, served)
    )
    assert trainers == "--nodelist=" + ",".join(f"node-{number}" for number in range(16))
    assert servers == "--nodelist=" + ",".join(f"node-{number}" for number in range(16, 24))
    assert {"--nodes=8", "--ntasks-per-node=1"} < set(served["words"])
    assert {"--nodes=16", "--kill-on-bad-exit=1"} < set(trained["words"])
    urls = trained["words"][trained["words"].index("--rollout-urls") + 1 :]
    assert urls == [f"http://node-{number}:30000" for number in range(16, 24)]
    key = served["set"]["PRISM_ROLLOUT_API_KEY"]
    assert re.fullmatch("[0-9a-f]{64}", key) and key == trained["set"]["PRISM_ROLLOUT_API_KEY"]
    assert key not in json.dumps(trained["words"]) + json.dumps(served["words"])
    assert trained["set"]["MASTER_ADDR"] == "node-0"


def test_a_server_is_started_again_until_it_is_told_to_end(tmp_path: Path) -> None:
    """Claim: SGLang gets its arguments by a file of its owner's alone, comes back when it dies, and ends at SIGTERM."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'cat "$4" >{tmp_path}/arguments; stat -c %a "$4" >{tmp_path}/mode; echo "$SGLANG_VLM_CACHE_SIZE_MB $*" '
        f">>{tmp_path}/starts\n"
        f"if (($(wc -l <{tmp_path}/starts) > 1)); then exec {sys.executable} -c 'import signal; signal.pause()'; fi\n",
        encoding="utf-8",
    )
    python.chmod(0o755)
    environment = {**os.environ, "SGLANG_PYTHON": str(python), "PRISM_ROLLOUT_API_KEY": "k" * 64, "SERVER_PAUSE": "0",
                   "TMPDIR": str(tmp_path)}  # fmt: skip
    starts = tmp_path / "starts"
    with started([str(SERVE), "/models/own", "8208"], env=environment) as script:
        wait_for(lambda: starts.exists() and len(starts.read_text(encoding="utf-8").splitlines()) == 2)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=60) == 0
    first, _ = starts.read_text(encoding="utf-8").splitlines()
    assert first.startswith("0 -m sglang.launch_server --config ") and "k" * 64 not in first
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8")
    assert {'model-path: "/models/own"', "context-length: 8208", "tp-size: 8"} < set(arguments.splitlines())
    assert f'api-key: "{"k" * 64}"' in arguments
    assert (tmp_path / "mode").read_text(encoding="utf-8").strip() == "600"
    assert not list(tmp_path.glob("tmp.*"))
