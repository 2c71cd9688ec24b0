"""``run_align.py`` on two hosts, each with a server of its own: killed, restarted, taken back with the right weights.

Hosts are network namespaces of this machine: their loopback devices are apart, and a cable of the kernel's joins them.
Skipped where this user may not make them. Blind to hosts with a disk or a clock of their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from prism_megatron.observability.metrics import read_metrics
from prism_megatron.rollout.sglang.arguments import PYTHON
from tests.sglang.conftest import REPOSITORY
from tests.two_hosts.hosts import Host, NoHostsError, two_hosts
from tests.waiting import wait_for

GAP = 1e-4
"""In nats a token, fp32: what the trainer and each server may differ by, at every step."""
FLAGS = (
    "--dtype", "fp32", "--steps", "2000", "--prompts-per-step", "2", "--rollouts-per-prompt", "4",
    "--rollout", "sglang", "--rollout-python", str(REPOSITORY / PYTHON),
    "--rollout-probe-every", "1", "--rollout-probe-bound", str(GAP),
)  # fmt: skip
STATE_SECONDS = 500.0


@pytest.fixture
def hosts() -> Iterator[Sequence[Host]]:
    """Two of them, joined."""
    try:
        with two_hosts() as made:
            yield made
    except NoHostsError as error:
        pytest.skip(str(error))


def start(hosts: Sequence[Host], output: Path, said: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    """One rank on each host, as a launcher for several hosts starts them; what each has ``said`` goes to a file."""
    processes = []
    for rank, host in enumerate(hosts):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29611", "GLOO_SOCKET_IFNAME": host.cable,
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        tool = str(REPOSITORY / "tools" / "run_align.py")
        command = host.command([sys.executable, tool, *FLAGS, "--output", str(output)])
        with said[rank].open("wb") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    return processes


def server_of(output: Path, host: int) -> psutil.Process | None:
    """The leader of the host's server, by the file of arguments that it was given."""
    wanted = str(output / "rollout" / f"host-{host}" / "server-0.yaml")
    for process in psutil.process_iter(["cmdline"]):
        if wanted in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def test_servers_of_two_hosts_die_and_come_back(hosts: Sequence[Host], tmp_path: Path) -> None:
    """Claim: at every step both servers score as the trainer does, or are left out; whichever host's is killed, its own
    host restarts it, and it is probed with the weights of then."""
    output = tmp_path / "run"
    said = [tmp_path / f"rank-{rank}.txt" for rank in range(2)]
    processes = start(hosts, output, said)
    metrics, log = output / "metrics.jsonl", output / "rollout" / "servers.log"

    def rows() -> int:
        assert all(process.poll() is None for process in processes), [path.read_text() for path in said]
        return len(read_metrics(metrics)) if metrics.exists() else 0

    def wait_for_rows(count: int) -> None:
        wait_for(lambda: rows() >= count, seconds=STATE_SECONDS, poll_seconds=0.5)

    try:
        wait_for_rows(2)
        # The main rank's own, of the first host, is waited for by every step's probe; the other is left out meanwhile.
        for host in (1, 0):
            victim, played = server_of(output, host), rows()
            assert victim is not None
            victim.kill()
            if host == 1:
                wait_for_rows(played + 1)
                wait_for(lambda: rows() > 0 and log.exists() and "is back" in log.read_text(), seconds=STATE_SECONDS)
            wait_for_rows(rows() + 3)
            successor = server_of(output, host)
            assert successor is not None and successor.pid != victim.pid
        processes[1].send_signal(signal.SIGTERM)
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [3, 3], [path.read_text() for path in said]
    played_rows = read_metrics(metrics)
    assert all(row["logprob_gap"] <= GAP for row in played_rows), [row["logprob_gap"] for row in played_rows]
    told = log.read_text()
    assert f"http://{hosts[1].address}:" in told and "is back, with version" in told
    assert played_rows[-1]["policy_version"] > played_rows[0]["policy_version"], "blind: no weights were handed over"
    print(f"{len(played_rows)} steps\n{told}")
    wait_for(lambda: server_of(output, 0) is None and server_of(output, 1) is None)
