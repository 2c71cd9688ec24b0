"""lmms-eval is an environment of its own that not every machine wants."""

from __future__ import annotations

import pytest

from prism_megatron.rollout.sglang.arguments import PYTHON as SGLANG_PYTHON
from tests.lmms_eval.harness import PYTHON, REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """``make test-lmms-eval`` sets it up, and SGLang's too, before it asks for these tests."""
    if not PYTHON.exists():
        pytest.skip("no lmms-eval: `make lmms-eval` sets up .venv-lmms")


@pytest.fixture(scope="session")
def sglang_installed() -> None:
    if not (REPOSITORY / SGLANG_PYTHON).exists():
        pytest.skip(f"no SGLang: `make sglang` sets up {SGLANG_PYTHON.parts[0]}")
