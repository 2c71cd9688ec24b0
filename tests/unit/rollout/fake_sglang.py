"""An HTTP server that speaks SGLang 0.5.23's protocol as far as the client uses it, with its failures.

It holds real weights and reads real images; only the sampling is made up: the tokens of a sample count up from its
number, and their log-probs are -token/1000.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore  # type: ignore[attr-defined]  # offered, not in __all__
from torch.distributed.distributed_c10d import (
    Backend,
    _new_process_group_helper,
    _world,
    destroy_process_group,
)
from torch.distributed.rendezvous import rendezvous

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.conversion.hf.reader import HFFolder

FOLDER = MINI_FOLDER / "policy"
KEY = "the right key"
PIXELS_OF_A_TOKEN = 32
CONTEXT = 600
UPDATES = ("/update_weights_from_tensor", "/update_weights_from_distributed", "/update_weights_from_disk")


@dataclass
class FakeSGLang:
    """State of one fake server. Tests set the fields of failures and read what was received."""

    image_token_id: int
    folder: Path = FOLDER
    url: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    version: str = "default"
    session_open: bool = False
    paused: bool = False
    num_layers: int = 4
    num_blocks: int = 3
    """of the vision tower"""
    context: int = CONTEXT
    """most tokens of a prompt and its response"""
    tp_size: int = 1
    together: threading.Barrier | None = None
    """generations end in groups: when as many are under way as this waits for"""
    cut_off: threading.Event | None = None
    """its workers reach no trainer; it says so once this is set"""
    extra_prompt_tokens: int = 0
    answer_status: list[int] = field(default_factory=list)
    """HTTP status of the next generations; 0 breaks the connection, 200 (or nothing left) answers"""
    finish_reason: str = "stop"
    held: tuple[int, str] | None = None
    """a token and a version: answers to prompts with the token end only when the server has the version"""
    aborted: bool = False
    tokens: tuple[int, ...] | None = None
    """every sample, instead of two tokens and the end token"""
    saves_memory: bool = False
    """whether it was started with --enable-memory-saver"""
    released: set[str] = field(default_factory=set)
    """the regions whose memory it has not"""
    barred_logprob: float = -60.0
    """log-prob, as the server has it, of each token that must not be sampled"""
    refuse: dict[str, int] = field(default_factory=dict)
    """paths that answer 400, and how many times"""
    die_at: str | None = None
    """path at which every call from now on breaks off, until ``restart``"""
    loaded: set[str] = field(default_factory=set)
    """names of all weights that came"""
    groups: dict[str, Any] = field(default_factory=dict)
    """process groups with trainers, by name"""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    dead: bool = False
    running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def restart(self) -> None:
        """What a new process has: the weights of its folder, and no session."""
        self.weights = load_file(self.folder / "model.safetensors")
        self.version, self.session_open, self.paused = "default", False, False
        self.leave_groups()
        self.die_at, self.dead, self.released = None, False, set()

    def leave_groups(self, *names: str) -> None:
        """Those of these names that there are, or all, as the end of a process does, which closes its connections."""
        for name in [name for name in names or tuple(self.groups) if name in self.groups]:
            destroy_process_group(self.groups.pop(name))

    def checksum(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(self.weights[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, {}
        if path == "/model_info":
            model_type = json.loads((self.folder / "config.json").read_text())["model_type"]
            return 200, {"model_type": model_type, "model_path": "/elsewhere", "weight_version": self.version}
        if path == "/server_info":
            return 200, {
                "running": self.running,
                "context_length": self.context,
                "tp_size": self.tp_size,
                "enable_memory_saver": self.saves_memory,
            }
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.calls.append((path, body))
            self.dead = self.dead or path == self.die_at
            if self.dead:
                self.leave_groups()
                raise ConnectionAbortedError
            if self.refuse.get(path, 0) > 0:
                self.refuse[path] -= 1
                return 400, {"success": False, "message": f"{path} was refused"}
        if path in ("/release_memory_occupation", "/resume_memory_occupation"):
            return self.occupy(path, body)
        if "weights" in self.released and path != "/pause_generation":
            raise ConnectionAbortedError
        if self.released and path in ("/generate", "/continue_generation"):
            raise ConnectionAbortedError
        if path == "/generate":
            return self.generate(body)
        if path == "/abort_request":
            self.aborted = True
            return 200, {}
        return self.control(path, body)

    def control(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path in ("/pause_generation", "/continue_generation"):
            self.paused = path == "/pause_generation"
            return 200, {"status": "ok"}
        if path == "/weights_checker":
            layers = [f"model.layers.{i}.input_layernorm.weight" for i in range(self.num_layers)]
            names = [*layers, *(f"visual.blocks.{i}.norm1.weight" for i in range(self.num_blocks))]
            return 200, {"ranks": [{"checksums": dict.fromkeys(names, "")}], "per_engine_checksum": self.checksum()}
        if path in {"/begin_weight_update", "/end_weight_update"}:
            wanted = path == "/end_weight_update"
            if self.session_open is not wanted:
                return 400, {"success": False, "message": "a session is already open" if not wanted else "no session"}
            self.session_open = not wanted
            return 200, {"success": True, "message": "Success"}
        if path == "/init_weights_update_group":
            if self.cut_off is not None:
                self.cut_off.wait()
                return 400, {"success": False, "message": "the trainer was not reached"}
            self.groups[body["group_name"]] = joined_group(body)
        elif path == "/destroy_weights_update_group":
            self.leave_groups(body["group_name"])
        elif path not in UPDATES:
            return 404, {"detail": "Not Found"}
        elif path != "/update_weights_from_disk" and not self.session_open:
            return 400, {"success": False, "message": "must run between begin and end"}
        else:
            self.load(self.read(path, body))
            self.version = body.get("weight_version", self.version)
        return 200, {"success": True, "message": "Success"}

    def read(self, path: str, body: dict[str, Any]) -> dict[str, Tensor]:
        """The weights of an update, as its way brings them."""
        if path == "/update_weights_from_disk":
            source = HFFolder(body["model_path"])
            return {name: source.get(name) for name in source.names()}
        if path == "/update_weights_from_distributed":
            return received(self.groups[body["group_name"]], body)
        assert body["load_format"] == "flattened_bucket"
        payloads = body["serialized_named_tensors"]
        assert len(payloads) == self.tp_size
        first, *others = [unpack(payload) for payload in payloads]  # each worker reads its own
        assert all(torch.equal(other[name], tensor) for other in others for name, tensor in first.items())
        return first

    def occupy(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Memory that was released is back with nothing in it; a call out of turn ends the process.

        So does memory for keys and values before that for weights, which it would leave no room.
        """
        tags, releases = set(body["tags"]), path == "/release_memory_occupation"
        wrong = tags & self.released if releases else tags - self.released
        if not self.saves_memory or wrong or not self.paused or self.running or not tags <= {"weights", "kv_cache"}:
            raise ConnectionAbortedError
        if not releases and "kv_cache" in tags and "weights" in self.released:
            raise ConnectionAbortedError
        self.released = self.released | tags if releases else self.released - tags
        if "weights" in tags:
            self.weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in self.weights.items()}
        return 200, None

    def load(self, tensors: dict[str, Tensor]) -> None:
        """As SGLang does it: unknown names are passed over, and a wrong shape is the end of the process."""
        self.loaded |= tensors.keys()
        for name, tensor in tensors.items():
            if name in self.weights:
                if self.weights[name].shape != tensor.shape:
                    raise ConnectionAbortedError
                self.weights[name] = tensor.clone()

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            status = self.answer_status.pop(0) if self.answer_status else 200
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        started_with = self.version
        if self.together is not None:
            self.together.wait()
        while self.holds(body["input_ids"][0]):
            time.sleep(0.002)
        with self.lock:
            self.running -= 1
        if status == 0:
            raise ConnectionAbortedError
        if status != 200:
            return status, {"error": {"message": "no room"}}
        pictures = [read_picture(url) for url in body.get("image_data", [[]])[0]]
        num_pads = body["input_ids"][0].count(self.image_token_id)
        if num_pads != len(pictures):
            return 500, {"error": {"message": "Internal Server Error"}}
        expanded = sum((w // PIXELS_OF_A_TOKEN) * (h // PIXELS_OF_A_TOKEN) - 1 for w, h in (p.size for p in pictures))
        prompt_tokens = len(body["input_ids"][0]) + expanded + self.extra_prompt_tokens
        versions = [started_with, self.version]
        return 200, [self.sample(i, prompt_tokens, body, versions) for i in range(body["sampling_params"]["n"])]

    def holds(self, token_ids: list[int]) -> bool:
        return self.held is not None and not self.aborted and self.held[0] in token_ids and self.version != self.held[1]

    def sample(self, number: int, prompt_tokens: int, body: dict[str, Any], versions: list[str]) -> dict[str, Any]:
        """The first token is of the first of ``versions``, all others of the second."""
        tokens = list(self.tokens or (number + 5, number + 6, *body["sampling_params"]["stop_token_ids"][:1]))
        return {
            "text": "",
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "abort" if self.aborted else self.finish_reason},
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(tokens),
                "weight_versions": spans(versions, len(tokens)),
                "output_token_logprobs": [[-token / 1000, token, None] for token in tokens],
                "output_token_ids_logprobs": [
                    [[self.barred_logprob, token, None] for token in body["token_ids_logprob"]] for _ in tokens
                ],
            },
        }


def spans(versions: list[str], length: int) -> list[dict[str, Any]]:
    first, then = versions
    if first == then:
        return [{"version": first, "start": 0, "end": length}]
    return [{"version": first, "start": 0, "end": 1}, {"version": then, "start": 1, "end": length}]


def joined_group(body: dict[str, Any]) -> Any:
    """As SGLang joins: by torch's own rendezvous and its way to make a group, the contract that the trainer keeps."""
    address = f"tcp://{body['master_address']}:{body['master_port']}"
    limit = timedelta(seconds=20)
    store, rank, size = next(rendezvous(address, body["rank_offset"], body["world_size"], timeout=limit))
    store, backend, name = PrefixStore(body["group_name"], store), Backend(body["backend"]), body["group_name"]
    group, _ = _new_process_group_helper(size, rank, [], backend, store, group_name=name, timeout=limit)
    _world.pg_group_ranks[group] = {other: other for other in range(size)}  # or it cannot be destroyed again
    return group


def received(group: Any, body: dict[str, Any]) -> dict[str, Tensor]:
    """One broadcast of all bytes, taken apart by names, dtypes and shapes."""
    assert body["load_format"] == "flattened_bucket"
    dtypes, shapes = [getattr(torch, dtype) for dtype in body["dtypes"]], map(torch.Size, body["shapes"])
    sizes = [(dtype, shape, shape.numel() * dtype.itemsize) for dtype, shape in zip(dtypes, shapes, strict=True)]
    raw = torch.empty(sum(size for _, _, size in sizes), dtype=torch.uint8)
    group.broadcast([raw], BroadcastOptions()).wait()
    parts = raw.split([size for _, _, size in sizes])
    tensors = [part.view(dtype).reshape(shape) for part, (dtype, shape, _) in zip(parts, sizes, strict=True)]
    return dict(zip(body["names"], tensors, strict=True))


def read_picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def unpack(payload: str) -> dict[str, Tensor]:
    """The tensors of a flattened bucket, read by its metadata alone."""
    bucket = pickle.loads(base64.b64decode(payload))
    flat = bucket["flattened_tensor"]
    return {m.name: flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape) for m in bucket["metadata"]}


@contextmanager
def running(image_token_id: int, folder: Path = FOLDER) -> Iterator[FakeSGLang]:
    """A fake server on a loopback port of its own."""
    fake = FakeSGLang(image_token_id, folder)
    fake.restart()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or the second of two small writes waits 40 ms for the first's confirmation

        def do_GET(self) -> None:
            self.respond(*fake.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.respond(*fake.post(self.path, body))
            except ConnectionAbortedError:
                self.close_connection = True

        def respond(self, status: int, answer: Any) -> None:
            if self.path != "/health" and self.headers.get("Authorization") != f"Bearer {KEY}":
                status, answer = 401, {"error": "Unauthorized"}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
