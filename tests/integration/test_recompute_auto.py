"""``--recompute auto`` comes to one setting, by the forecast, before any rank begins: the same on all of them.

Devices are as large as the forecast of the mini's fine-tuning says that they have to be, which the tests ask first.
Blind spot: a GPU's own size, and hosts with different ones.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands import sft
from prism_megatron.commands.starting import foretold
from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.commands.starting.named_models import policy_shape
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.errors import ConfigError, PrismError
from prism_megatron.forecast import before_start
from prism_megatron.forecast.build import plan_sft
from prism_megatron.forecast.plays import Case
from prism_megatron.forecast.verdict import GIB

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "integration" / "recompute_script.py"
NONE, SELECTIVE, FULL = RecomputeConfig("auto").by_arithmetic()
WAIT_SECONDS = 400.0
"""Generous: the machine may be busy, and only hanging is a failure here."""

Played = Callable[[Sequence[Case]], list[Mapping[str, Any]]]


@pytest.fixture(scope="module")
def played() -> Played:
    """What a child has played once, of one rank and of two, with each setting."""
    config = sft.parse([])
    shape = policy_shape(config.model, of_the_mini="base")
    cases = [
        replace(plan_sft(config, shape, world_size=size).policy, recompute=recompute)
        for size in (1, 2)
        for recompute in (NONE, SELECTIVE, FULL)
    ]
    lines = dict(zip(map(repr, cases), before_start.played(cases), strict=True))
    return lambda wanted: [lines[repr(case)] for case in wanted]


@pytest.fixture
def needs(played: Played, monkeypatch: pytest.MonkeyPatch) -> Callable[[RecomputeConfig, int], float]:
    """GiB of a setting's step in a world of so many ranks; within a test nothing is played anew by this process."""
    monkeypatch.setattr(before_start, "played", played)
    config = sft.parse([])
    shape = policy_shape(config.model, of_the_mini="base")

    def gib(recompute: RecomputeConfig, size: int) -> float:
        planned = plan_sft(config, shape, world_size=size).recomputing(recompute)
        return before_start.needs_of(planned)[0].at_worst()[1] / GIB

    return gib


def asked(gib: float, *more: str) -> list[str]:
    return ["--recompute", "auto", "--device-gib", repr(gib), "--device-reserve-gib", "0", *more]


@pytest.mark.parametrize("wanted", [NONE, SELECTIVE, FULL], ids=lambda one: one.recompute)
def test_the_first_setting_that_fits_is_taken(
    wanted: RecomputeConfig, needs: Callable[[RecomputeConfig, int], float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: on a device that holds a setting to the byte it is that one; dearer ones are not played, and each that was
    tried has a line with its need."""
    config = sft.parse(asked(needs(wanted, 1)))
    assert sft.foretell(config, FirstRank()) == replace(config, recompute=wanted)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--recompute")]
    tried = [NONE, SELECTIVE, FULL][: [NONE, SELECTIVE, FULL].index(wanted) + 1]
    assert [line.split(":")[0] for line in lines] == [one.as_flags() for one in tried]
    assert [line.endswith("which fits") for line in lines] == [False] * (len(tried) - 1) + [True]


def test_what_no_setting_fits_is_refused(needs: Callable[[RecomputeConfig, int], float]) -> None:
    """Claim: the refusal is that of --recompute full, whose flags it does not name again, and says how to start it."""
    config = sft.parse(asked(0.9 * needs(FULL, 1)))
    with pytest.raises(ConfigError, match=r"a smaller --max-tokens .* by --recompute full --forecast off") as found:
        sft.foretell(config, FirstRank())
    assert "--recompute full and" not in str(found.value)


def test_without_a_device_there_is_nothing_to_settle_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foretold, "has_gpu", lambda: False)
    monkeypatch.setattr(before_start, "has_gpu", lambda: False)
    monkeypatch.delattr(before_start, "needs_of")
    with pytest.raises(ConfigError, match=r"this host shows no GPU; give .* --device-gib, or name --recompute none"):
        sft.foretell(sft.parse(["--recompute", "auto"]), FirstRank())


def test_what_cannot_be_played_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a run that would begin without a forecast does not begin with --recompute auto."""
    monkeypatch.setattr(before_start, "played", lambda cases: [{"error": "virtual stages"}] * len(cases))
    config = sft.parse(["--device-gib", "80"])
    assert sft.foretell(config, FirstRank()) == config
    with pytest.raises(ConfigError, match="virtual stages; use --forecast off, and name --recompute none"):
        sft.foretell(sft.parse(asked(80)), FirstRank())


@pytest.mark.long
def test_every_rank_of_torchrun_begins_with_the_one_answer(
    needs: Callable[[RecomputeConfig, int], float], tmp_path: Path
) -> None:
    """Claim: rank 0 alone plays; both ranks, and what the run keeps of its configuration, have what it came to."""
    flags = asked(needs(SELECTIVE, 2), "--steps", "1", "--output", str(tmp_path / "run"))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT),
         str(tmp_path), *flags],
        cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("counting what a step needs") == 1
    for rank in (0, 1):
        begun = json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8"))
        assert begun == {"recompute": "selective", "recompute_modules": ["mlp"], "recompute_vision": False}
    kept = read_yaml(tmp_path / "run" / "config.yaml")["recompute"]
    assert (kept["recompute"], kept["recompute_modules"]) == ("selective", ["mlp"])
    assert "\n  recompute: selective\n" in result.stdout


@pytest.mark.slow
def test_what_rank_0_refuses_ends_every_rank_in_the_same_words(
    needs: Callable[[RecomputeConfig, int], float], tmp_path: Path
) -> None:
    """Claim: ranks that nothing watches, as a launcher other than torchrun starts them, all end by themselves."""
    first, second = _alone(tmp_path, *asked(0.9 * needs(FULL, 2)))
    assert first[0] == second[0] == PrismError.status, (first, second)
    assert first[2].splitlines()[-1].startswith("error: rank 0 needs ")
    assert second[2].splitlines()[-1] == first[2].splitlines()[-1]
    assert second[1] == ""
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_rank_plays_what_is_only_counted(tmp_path: Path) -> None:
    """Claim: with --forecast only rank 0 prints the counts, and the others end well and in silence."""
    first, second = _alone(tmp_path, "--forecast", "only")
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert first[1].count(" at most ") == 1
    assert second[1] == ""
    assert list(tmp_path.iterdir()) == []


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def _alone(folder: Path, *flags: str) -> list[tuple[int, str, str]]:
    """Status, output and errors of two ranks that only the variables of torch.distributed hold together."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), *flags],
            cwd=ROOT,
            env=_environment() | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1",
                                  "MASTER_PORT": port},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        ended = [rank.communicate(timeout=WAIT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *said) for rank, said in zip(ranks, ended, strict=True)]
