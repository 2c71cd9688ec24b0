"""An engine on fake servers, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prism_megatron.rollout.base import SampleRequest, Sampling, SegmentFinder
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.http import Patience
from prism_megatron.types import Prompt, Rollout
from tests.unit.rollout.fake_sglang import FOLDER, KEY, FakeSGLang
from tests.unit.rollout.tiny_qwen import NoSegments

END = 488
"""The mini's end token."""
IMPATIENT = Patience(first_pause=0.002, longest_pause=0.01)


class FakeSupervision:
    """Restarts a server when the test says so."""

    def __init__(self, fakes: list[FakeSGLang]) -> None:
        self.urls = tuple(fake.url for fake in fakes)
        self.replaced: list[str] = []

    def on_restart(self, callback: Callable[[str], None]) -> None:
        self.restarted = callback

    def supervises(self, url: str) -> bool:
        return url in self.urls

    def replace(self, url: str) -> bool:
        self.replaced.append(url)
        return True

    def stop(self) -> None:
        pass


def attached(
    fakes: Sequence[FakeSGLang],
    spool: Path,
    *,
    finder: SegmentFinder | None = None,
    servers: Any = None,
    **options: Any,
) -> SGLangRollout:
    settings: dict[str, Any] = {"seconds": 20.0, "patience": IMPATIENT} | options
    return SGLangRollout(
        FOLDER,
        finder or NoSegments(),
        urls=[fake.url for fake in fakes],
        api_key=KEY,
        end_token_ids=[END],
        spool=spool,
        servers=servers,
        options=SGLangOptions(**settings),
    )


def draw(engine: SGLangRollout, count: int = 1, n: int = 1, max_new_tokens: int = 8) -> list[tuple[Rollout, ...]]:
    """``n`` samples of each of ``count`` text prompts."""
    prompts = [Prompt(f"p{i}", (5, 6, 7), (), "") for i in range(count)]
    return engine.generate(SampleRequest(prompts, n, Sampling(max_new_tokens=max_new_tokens), seed=0, step=0))
