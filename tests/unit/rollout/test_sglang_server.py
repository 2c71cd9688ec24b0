"""Processes of servers: started, watched, restarted, ended, and never left behind.

A stub stands in for the ``sglang`` package, run by the real guard in a process group of its own. Blind to what SGLang
itself does at start and end, for which ``tests/sglang`` is there.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # offered, not in __all__

from prism_megatron.errors import ConfigError, RolloutError
from prism_megatron.rollout.sglang import ports
from prism_megatron.rollout.sglang.arguments import ServerOptions, server_arguments, server_environment
from prism_megatron.rollout.sglang.board import Board
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.sglang.restarts import Restarts
from prism_megatron.rollout.sglang.server import SGLangServer, SGLangServers
from tests.unit.rollout.stub_sglang import stub_python
from tests.waiting import wait_for

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., ServerOptions]:
    """Options whose interpreter finds the stub as ``sglang``."""
    python = stub_python(tmp_path)

    def build(model: str = "model", start_seconds: float = 60.0) -> ServerOptions:
        return ServerOptions(
            tmp_path / model, tmp_path / "logs", python=python, start_seconds=start_seconds, poll_seconds=0.02
        )

    return build


def worker_pids(server: SGLangServer) -> list[int]:
    return [int(line.split()[1]) for line in server.log.read_text().splitlines() if line.startswith("worker ")]


def exists(pid: int) -> bool:
    """Whether the process lives; one that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_free_port_ends_the_search(options: Callable[..., ServerOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "why_not_free", lambda _host, _port: "Address already in use")
    with pytest.raises(RolloutError, match=r"^no port of 127\.0\.0\.1 from 20000 to 29999 is free"):
        SGLangServer(options(), index=0, api_key="key")


def test_a_killed_server_is_started_again_and_announced(options: Callable[..., ServerOptions]) -> None:
    servers = SGLangServers(options(), count=2)
    announced: list[str] = []
    servers.on_restart(announced.append)
    servers.start()
    try:
        killed, other = servers.servers
        before = {server.url: server.pid for server in servers.servers}
        assert servers.replace(killed.url), "a supervised server is replaced"
        wait_for(lambda: announced == [killed.url])
        assert killed.client.is_ready() and killed.pid != before[killed.url]
        assert other.pid == before[other.url]
        assert not servers.replace("http://127.0.0.1:1"), "nobody restarts a stranger"
    finally:
        servers.stop()
    # What SIGKILL ends is gone a moment later.
    wait_for(lambda: not any(exists(pid) for server in servers.servers for pid in worker_pids(server)))
    assert len(worker_pids(killed)) == 2, "the log of the first process is kept"


def problem_of(servers: SGLangServers) -> str:
    """Why servers that died are not started again; empty while they are."""
    try:
        assert servers.supervises(servers.urls[0])
    except RolloutError as error:
        return str(error)
    return ""


def test_restarts_are_counted(options: Callable[..., ServerOptions]) -> None:
    servers = SGLangServers(options(), count=1, restarts=Restarts(0))
    servers.start()
    (server,) = servers.servers
    server.kill()

    wait_for(lambda: "servers were restarted 0 times within an hour" in problem_of(servers))
    servers.stop()


def test_a_server_is_restarted_as_often_as_is_allowed(options: Callable[..., ServerOptions]) -> None:
    """All servers together: each dies once, then one of them again."""
    servers = SGLangServers(options(), count=2, restarts=Restarts(2))
    back: list[str] = []
    servers.on_restart(back.append)
    servers.start()
    first, second = servers.servers
    first.kill()
    wait_for(lambda: back == [first.url])
    second.kill()
    wait_for(lambda: back == [first.url, second.url])
    assert not problem_of(servers)
    first.kill()
    wait_for(lambda: "server 0 died, and servers were restarted 2 times" in problem_of(servers), seconds=20.0)
    servers.stop()


def test_a_server_that_is_being_restarted_is_not_lost_once_more(options: Callable[..., ServerOptions]) -> None:
    """Whoever gives it its weights may meet an error and ask for another: the one that starts is left alone."""
    servers = SGLangServers(options(), count=1)
    lived: list[bool] = []

    def restored(url: str) -> None:
        lived.append(servers.replace(url) and servers.servers[0].is_running())

    servers.on_restart(restored)
    servers.start()
    servers.servers[0].kill()
    wait_for(lambda: bool(lived))
    servers.stop()
    assert lived == [True]


def test_another_process_can_have_a_server_replaced(options: Callable[..., ServerOptions]) -> None:
    """Claim: once for all that lose it while it is gone, for a new one would be ended by what was said of the old."""
    board = Board(HashStore())
    servers = SGLangServers(options(), count=1, board=board)
    (server,) = servers.servers
    back: list[int | None] = []

    def restored(url: str) -> None:
        board.ask_to_replace(url)  # by one that met the old process
        back.append(server.pid)

    servers.on_restart(restored)
    servers.start()
    before = server.pid
    board.ask_to_replace(server.url)
    wait_for(lambda: len(back) == 1)
    wait_for(lambda: servers._times_asked[server.url] == 2)
    board.ask_to_replace("http://another")
    assert server.is_running() and server.pid == back[0] != before
    board.ask_to_replace(server.url)
    wait_for(lambda: len(back) == 2)
    servers.stop()


def test_that_servers_are_restarted_no_more_is_told_to_other_processes(options: Callable[..., ServerOptions]) -> None:
    board = Board(HashStore())
    servers = SGLangServers(options(), count=1, restarts=Restarts(0), board=board)
    servers.start()
    assert board.problem() is None
    servers.servers[0].kill()
    wait_for(lambda: "were restarted 0 times within an hour" in (board.problem() or ""))
    servers.stop()


def test_servers_listen_at_the_address_they_are_told(options: Callable[..., ServerOptions]) -> None:
    """Claim: there alone: nobody reaches them at another address of the same host."""
    servers = SGLangServers(replace(options(), host="127.0.0.2"), count=1)
    servers.start()
    (url,) = servers.urls
    assert url.startswith("http://127.0.0.2:") and servers.servers[0].client.is_ready()
    elsewhere = ServerClient(url.replace("127.0.0.2", "127.0.0.1"), api_key=None)
    assert not elsewhere.is_ready()
    elsewhere.close()
    servers.stop()
    assert SGLangServer(replace(options(), host="::1"), index=0, api_key="key").url.startswith("http://[::1]:")


def test_a_supervisor_that_dies_is_heard_of(options: Callable[..., ServerOptions]) -> None:
    """Restarting meets an error that is none of ours, as a log on a full disk would be."""

    def note(url: str) -> None:
        Path("/nowhere/note").write_text(url)

    servers = SGLangServers(options(), count=1)
    servers.on_restart(note)
    servers.start()
    (server,) = servers.servers
    server.kill()

    wait_for(lambda: "no longer watched: FileNotFoundError" in problem_of(servers))
    servers.stop()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(options: Callable[..., ServerOptions]) -> None:
    with pytest.raises(RolloutError, match=r"server 0 ended while it started; .*server-0\.log ends:.*cannot be served"):
        SGLangServers(options("broken"), count=1).start()
    slow = SGLangServers(options("slow", start_seconds=0.6), count=1)
    with pytest.raises(RolloutError, match="not ready after 1 s"):
        slow.start()
    assert not slow.servers[0].is_running()


def test_stopping_does_not_wait_for_a_server_that_is_starting(options: Callable[..., ServerOptions]) -> None:
    server = SGLangServer(options("slow"), index=0, api_key="key")
    server.start()
    stop = threading.Event()
    stop.set()
    with pytest.raises(RolloutError, match="stopped while it started"):
        server.wait(stop)
    server.stop()
    assert not server.is_running()


def test_no_process_outlives_a_killed_parent(options: Callable[..., ServerOptions], tmp_path: Path) -> None:
    """SIGKILL leaves the parent no chance to end anything."""
    python, model, logs = options().python, options().model, tmp_path / "logs"
    script = f"""
import time
from pathlib import Path
from prism_megatron.rollout.sglang.arguments import ServerOptions
from prism_megatron.rollout.sglang.server import SGLangServers
servers = SGLangServers(ServerOptions(Path({str(model)!r}), Path({str(logs)!r}), python=Path({str(python)!r})), count=1)
servers.start()
print(servers.servers[0].pid, flush=True)
time.sleep(600)  # until it is killed
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    (worker,) = [int(line.split()[1]) for line in (logs / "server-0.log").read_text().splitlines() if "worker" in line]
    assert exists(pid) and exists(worker), "blind: nothing to leave behind"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not exists(pid) and not exists(worker))
    parent.stdout.close()


def test_the_key_is_not_on_the_command_line_and_files_are_private(options: Callable[..., ServerOptions]) -> None:
    servers = SGLangServers(options(), count=1)
    servers.start()
    try:
        (server,) = servers.servers
        assert len(servers.api_key) >= 32
        assert servers.api_key not in Path(f"/proc/{server.pid}/cmdline").read_text()
        for file in server.options.logs.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    finally:
        servers.stop()


def test_no_key_is_taken_for_an_option(options: Callable[..., ServerOptions]) -> None:
    """SGLang hands the file of arguments to argparse, which knows no value that starts with a dash."""
    with pytest.raises(ConfigError, match="starts with -"):
        SGLangServers(options(), count=1, api_key="-secret")
    assert int(SGLangServers(options(), count=1).api_key, 16), "a random key is a hexadecimal number"


def test_a_missing_environment_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make sglang"):
        SGLangServers(ServerOptions(tmp_path, tmp_path, python=tmp_path / "none"), count=1)


def test_cpu_arguments_and_stand_ins_are_for_machines_without_cuda(tmp_path: Path) -> None:
    options = ServerOptions(tmp_path, tmp_path, tp=2, max_total_tokens=99)
    gpu, cpu = (server_arguments(options, index=0, port=5, cuda=cuda) for cuda in (True, False))
    assert "device" not in gpu and gpu["tp-size"] == 2 and gpu["max-total-tokens"] == 99
    assert cpu["device"] == "cpu" and "base-gpu-id" not in cpu
    rank = {"RANK": "3", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": "/ours", "HOME": "/home"}
    gpu_environment, cpu_environment = (server_environment(rank, tp=2, cuda=cuda) for cuda in (True, False))
    assert rank.keys() & gpu_environment.keys() == {"HOME"}
    assert cpu_environment["PYTHONPATH"].endswith("cpu_stand_ins") and cpu_environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert cpu_environment["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1, "SGLang wants cores for every rank"
    for environment in (gpu_environment, cpu_environment):
        assert environment["SGLANG_VLM_CACHE_SIZE_MB"] == "0", "image features of old weights would be used again"


def test_no_two_servers_share_a_gpu(tmp_path: Path) -> None:
    options = ServerOptions(tmp_path, tmp_path, tp=2, first_gpu=3, memory_fraction=0.4, releases_memory=True)
    arguments = [server_arguments(options, index=index, port=5, cuda=True) for index in range(3)]
    assert [a["base-gpu-id"] for a in arguments] == [3, 5, 7]
    assert all(a["enable-memory-saver"] is True and a["mem-fraction-static"] == 0.4 for a in arguments)
    plain = server_arguments(ServerOptions(tmp_path, tmp_path), index=0, port=5, cuda=True)
    assert not plain.keys() & {"enable-memory-saver", "mem-fraction-static"}


def test_ports_are_none_that_the_kernel_gives_away(options: Callable[..., ServerOptions]) -> None:
    """Between the choice of a port and the server's bind lies a minute of loading."""
    first_of_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first_of_kernel <= 30_000:
        pytest.skip("this machine's kernel gives away more ports than most")
    for server in SGLangServers(options(), count=20).servers:
        assert 1024 < int(server.url.rpartition(":")[2]) < first_of_kernel
