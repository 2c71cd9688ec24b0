"""What all tests share: the optional data folder, seeds, and a summary of what was not run and why."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SEED = int(os.environ.get("PRISM_TEST_SEED", "20260"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real records and Qwen3-VL's tokenizer: $PRISM_SHARED, or ``shared`` beside the checkout."""
    folder = Path(os.environ.get("PRISM_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no shared data: set PRISM_SHARED, or put the folder `shared` beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from one seed, whatever ran before it; PRISM_TEST_SEED tries another."""
    import torch

    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  # third-party code may draw from numpy's global generator
    torch.manual_seed(SEED)


def pytest_configure() -> None:
    """Jobs in a shell's background ignore Ctrl-C, and so would all that tests start; here it is heard."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    for item in items:
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]  # a wrapper hook receives the result
    if report.failed:
        report.sections.append(("seed", f"PRISM_TEST_SEED={SEED}"))
    return report  # type: ignore[return-value]  # and hands it on


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else (str(report.longrepr),)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if deselected := len(terminalreporter.stats.get("deselected", [])):
        reasons["deselected on the command line"] = deselected
    if reasons:
        terminalreporter.section("not run")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:4d}  {reason}")
