"""Starts, supervises and stops SGLang servers, each a process group of its own in SGLang's own environment.

A server listens on one address of this host, by default a loopback one, asks for a random key, writes its log to a
file, is started again when it dies, and dies with the process that started it. The trainer never imports sglang: see
``sglang_http``.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from prism_megatron.errors import ConfigError, PrismError, RolloutError
from prism_megatron.rollout.sglang.arguments import ServerOptions, server_arguments, server_environment
from prism_megatron.rollout.sglang.board import Board
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.sglang.ports import free_port
from prism_megatron.rollout.sglang.restarts import Restarts

_GUARD = Path(__file__).resolve().parent / "guard.py"
_NUM_LINES_SHOWN = 12


class SGLangServer:
    """One server process. ``start`` may be called again after the process has died; the port and the key stay."""

    def __init__(self, options: ServerOptions, *, index: int, api_key: str) -> None:
        """Raises ConfigError where SGLang is not installed."""
        if not options.python.exists():
            raise ConfigError(f"{options.python} does not exist; set up SGLang's own environment with `make sglang`")
        self.options = options
        self.index = index
        self.log = options.logs / f"server-{index}.log"
        self._api_key = api_key
        self._port = free_port(options.host) if options.port is None else options.port
        host = f"[{options.host}]" if ":" in options.host else options.host
        self.client = ServerClient(f"http://{host}:{self._port}", api_key=api_key)
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def pid(self) -> int | None:
        """Of the server's process, which leads its group; None before the first start."""
        return None if self._process is None else self._process.pid

    def is_running(self) -> bool:
        """Whether the process exists; it may not answer yet."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return at once; ``wait`` waits for it to answer."""
        self._end()
        self.options.logs.mkdir(parents=True, exist_ok=True)
        arguments = self._write_arguments()
        reading, self._lifeline = os.pipe()
        try:
            with open(self.log, "ab", opener=_private) as log:
                self._process = subprocess.Popen(
                    [self.options.python, "-P", _GUARD, str(reading), "--config", arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=server_environment(os.environ, tp=self.options.tp, cuda=torch.cuda.is_available()),
                    pass_fds=(reading,),
                    start_new_session=True,
                )
        finally:
            os.close(reading)

    def wait(self, stop: threading.Event | None = None) -> None:
        """Return once the server answers. Raises RolloutError, with the end of its log, if it dies or takes too long.

        A set ``stop`` ends the wait with the same error.
        """
        deadline = time.monotonic() + self.options.start_seconds
        while not self.client.is_ready():
            if not self.is_running():
                raise RolloutError(f"SGLang server {self.index} ended while it started; {self._log_tail()}")
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"SGLang server {self.index} is not ready after {self.options.start_seconds:.0f} s; "
                    f"{self._log_tail()}"
                )
            if stop is not None and stop.is_set():
                raise RolloutError(f"SGLang server {self.index} was stopped while it started")
            time.sleep(self.options.poll_seconds)

    def kill(self) -> None:
        """End the process group at once; ``start`` may follow."""
        if self.is_running() and self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """End the process and all it started; harmless if it has ended."""
        self._end()
        self.client.close()

    def _end(self) -> None:
        """SIGKILL to the group, also where its leader is dead already: a server has nothing worth a slow goodbye."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _write_arguments(self) -> Path:
        """A file that only its owner reads: arguments on a command line, the key among them, are public."""
        path = self.options.logs / f"server-{self.index}.yaml"
        arguments = server_arguments(self.options, index=self.index, port=self._port, cuda=torch.cuda.is_available())
        content = {"api-key": self._api_key} | arguments
        with open(path, "w", encoding="utf-8", opener=_private) as file:
            json.dump(content, file, indent=2)  # SGLang reads YAML, of which JSON is a part
        return path

    def note(self, text: str) -> None:
        """Add a line of ours to the server's log."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")

    def _log_tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{self.log} ends: {' | '.join(line.strip() for line in lines[-_NUM_LINES_SHOWN:])}"


class SGLangServers:
    """Several servers of one model, supervised by a thread that starts a dead one again."""

    def __init__(
        self,
        options: ServerOptions,
        *,
        count: int,
        api_key: str | None = None,
        restarts: Restarts | None = None,
        board: Board | None = None,
    ) -> None:
        """``api_key`` is a random one by default. ``restarts`` bounds those of all servers together.

        On the ``board`` other processes ask for a new server, and are told when there will be none.

        Raises ConfigError where SGLang is not installed, and for a key that it could not be given.
        """
        key = secrets.token_hex(32) if api_key is None else api_key
        if key.startswith("-"):
            raise ConfigError("an API key that starts with - is an option to SGLang; use another")
        self.api_key = key
        self._poll_seconds = options.poll_seconds
        self.servers = tuple(SGLangServer(options, index=index, api_key=key) for index in range(count))
        self._restarts = restarts or Restarts()
        self._board = board
        self._times_asked: dict[str, int] = {}
        self._on_restart: Callable[[str], object] | None = None
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="sglang supervisor", daemon=True)
        self._restarting: str | None = None
        self._failure: RolloutError | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(server.url for server in self.servers)

    def start(self) -> None:
        """Start all servers, wait until they answer, then watch them. Raises RolloutError; then none is left."""
        try:
            for server in self.servers:
                server.start()
            for server in self.servers:
                server.wait()
        except BaseException:
            self.stop()
            raise
        self._supervisor.start()

    def on_restart(self, callback: Callable[[str], object]) -> None:
        """Have ``callback(url)`` called when a server answers again after a restart: it has its folder's weights."""
        self._on_restart = callback

    def supervises(self, url: str) -> bool:
        """Whether the server at ``url`` is started again when it dies. Raises RolloutError if that has failed."""
        if self._failure is not None:
            raise self._failure
        return url in self.urls and not self._stopping.is_set()

    def replace(self, url: str) -> bool:
        """Have the lost server at ``url`` started again; False if nobody here does. Raises as ``supervises``.

        One that hangs is ended first; one that is starting already is left alone.
        """
        if not self.supervises(url):
            return False
        if url != self._restarting:
            self.servers[self.urls.index(url)].kill()
        return True

    def stop(self) -> None:
        """End all servers and the supervision."""
        self._stopping.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        for server in self.servers:
            server.stop()

    def _supervise(self) -> None:
        """The supervisor's thread: what ends it is what the next caller of ``supervises`` is told."""
        try:
            self._watch()
        except Exception as error:  # noqa: BLE001 - a thread that dies unheard leaves callers waiting for its servers
            self._give_up(f"SGLang servers are no longer watched: {error!r}")

    def _watch(self) -> None:
        while not self._stopping.wait(self._poll_seconds):
            for server in self.servers:
                if self._is_asked_for(server):
                    server.kill()
                if server.is_running():
                    continue
                if not self._restarts.begin():
                    self._give_up(
                        f"SGLang server {server.index} died, and servers were restarted {self._restarts.per_hour} "
                        f"times within an hour; see {server.log}, or raise --rollout-restarts-per-hour"
                    )
                    return
                self._restarting = server.url
                try:
                    self._restart(server)
                except PrismError as error:
                    server.note(f"restart failed: {error}")
                    server.kill()  # and so it is tried again
                self._restarting = None
                self._is_asked_for(server)  # of before

    def _is_asked_for(self, server: SGLangServer) -> bool:
        """Whether another process has lost the server since this was last asked."""
        if self._board is None:
            return False
        before = self._times_asked.get(server.url, 0)
        self._times_asked[server.url] = self._board.times_asked(server.url)
        return self._times_asked[server.url] > before

    def _give_up(self, problem: str) -> None:
        self._failure = RolloutError(problem)
        if self._board is not None:
            with suppress(RolloutError):  # nobody is left who could read it
                self._board.give_up(problem)

    def _restart(self, server: SGLangServer) -> None:
        server.start()
        server.wait(self._stopping)
        if self._on_restart is not None:
            self._on_restart(server.url)


def _private(path: str, flags: int) -> int:
    """Opener of files that hold the key; SGLang writes all its arguments to its log."""
    return os.open(path, flags, 0o600)
