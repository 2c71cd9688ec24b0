"""Two real SGLang servers of the mini's policy, started once, and what the tests compare them with."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.render import Renderer
from prism_megatron.rollout.sglang.arguments import PYTHON, ServerOptions
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.restarts import Restarts
from prism_megatron.rollout.sglang.server import SGLangServer, SGLangServers
from prism_megatron.types import Prompt, Rollout
from tests.unit.rollout.oracle import forced_logprobs
from tests.waiting import wait_for

FOLDER = MINI_FOLDER / "policy"
SAMPLING_SECONDS = 120.0
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class World:
    """Servers, the engine on them, and the same model in transformers."""

    servers: SGLangServers
    engine: SGLangRollout
    renderer: Renderer
    oracle: Any
    folder: Path
    """for spools and the servers' logs"""

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the oracle the weights that the engine is given."""
        self.oracle.load_state_dict(weights, strict=False)
        self.oracle.tie_weights()

    def gap(self, prompt: Prompt, group: tuple[Rollout, ...], temperature: float = 1.0) -> float:
        """Largest difference between the rollouts' log-probs and the oracle's, in nats."""
        return max(
            float(
                (torch.tensor(r.logprobs).double() - forced_logprobs(self.oracle, prompt, r, temperature)).abs().max()
            )
            for r in group
        )

    def prompts(self) -> list[Prompt]:
        return some_prompts(self.renderer)


def steps_told(servers: Sequence[SGLangServer]) -> list[int]:
    """How often each server's log says that it samples: SGLang has a line for every 40 steps in which requests run."""
    return [
        len(re.findall(r"Decode batch.*#running-req: [1-9]", server.log.read_text(encoding="utf-8", errors="replace")))
        for server in servers
    ]


def wait_until_sampling(
    servers: Sequence[SGLangServer],
    told: Sequence[int],
    thread: threading.Thread,
    *,
    enough: Callable[[Iterable[bool]], bool] = all,
) -> None:
    """Until ``enough`` of the ``servers`` have sampled since their logs ``told`` so often, or the ``thread`` ended.

    The thread is the one that asks them.
    """
    wait_for(
        lambda: not thread.is_alive() or enough(map(int.__gt__, steps_told(servers), told)),
        seconds=SAMPLING_SECONDS,
        poll_seconds=0.01,
    )


def some_prompts(renderer: Renderer) -> list[Prompt]:
    """Text; one image; two images of different sizes, which the processor resizes."""
    return [
        renderer.prompt("text", "How many circles are there?", []),
        renderer.prompt("one", "How many red circles?", [picture(0, 96, 96)]),
        renderer.prompt("two", "Which one shows more?", [picture(1, 333, 100), picture(2, 50, 61)]),
    ]


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mini_options(logs: Path) -> ServerOptions:
    return ServerOptions(
        model=FOLDER,
        logs=logs,
        python=REPOSITORY / PYTHON,
        dtype="float32",
        context_length=1024,
        max_total_tokens=16384,
        max_running_requests=64,
        start_seconds=400.0,  # 20 s on two free cores
    )


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """SGLang is 2.7 GB that not every machine wants; ``make test-sglang`` sets it up before it asks for these tests."""
    if not (REPOSITORY / PYTHON).exists():
        pytest.skip(f"no SGLang: `make sglang` sets up {PYTHON.parts[0]}")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServers]:
    servers = SGLangServers(mini_options(tmp_path_factory.mktemp("logs")), count=2, restarts=Restarts(4))
    servers.start()
    yield servers
    servers.stop()


@pytest.fixture(scope="session")
def world(servers: SGLangServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    renderer, folder = Renderer.from_folder(FOLDER), tmp_path_factory.mktemp("spool")
    engine = SGLangRollout(
        FOLDER,
        renderer.segment_finder,
        urls=servers.urls,
        api_key=servers.api_key,
        end_token_ids=[renderer.end_token_id],
        spool=folder,
        servers=servers,
        options=SGLangOptions(bucket_bytes=200_000),
    )
    model_class: Any = Qwen3VLForConditionalGeneration
    oracle = model_class.from_pretrained(FOLDER, dtype=torch.float32).eval()
    yield World(servers, engine, renderer, oracle, folder)
    engine.close()
