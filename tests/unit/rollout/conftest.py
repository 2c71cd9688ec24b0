"""Two fake servers, and an engine that is attached to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from tests.unit.rollout.attached import IMPATIENT
from tests.unit.rollout.fake_sglang import FOLDER, KEY, FakeSGLang, running
from tests.unit.rollout.tiny_qwen import NoSegments
from tests.unit.rollout.weight_servers import Attach


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(image_token_id=498)) for _ in range(2)]


@pytest.fixture
def attach(fakes: list[FakeSGLang], tmp_path: Path) -> Iterator[Attach]:
    engines: list[SGLangRollout] = []

    def build(servers: Any = None, **options: Any) -> SGLangRollout:
        settings: dict[str, Any] = {"patience": IMPATIENT} | options
        engines.append(
            SGLangRollout(
                FOLDER,
                NoSegments(),
                urls=[fake.url for fake in fakes],
                api_key=KEY,
                end_token_ids=[488],
                spool=tmp_path,
                servers=servers,
                options=SGLangOptions(**settings),
            )
        )
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()
        engine.close()  # as the queue of a run that ends early does, and then the run
    assert not list(tmp_path.glob("weights-*")), "spooled weights were left behind"
