"""``prism-plan``: tables and JSON of a run that is not started; with ``--no-play`` nothing is played."""

from __future__ import annotations

import json

import pytest

from prism_megatron.commands.plan import main
from prism_megatron.errors import PrismError

ALIGN = ["align", "--model", "4B", "--discriminator", "2B", "--tp", "4", "--pp", "2", "--gpus", "8", "--no-play"]


def test_a_stages_own_flags_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: memory of both roles on the first and the last rank, phases with their roof, hours, disk; status 0."""
    assert main(ALIGN) == 0
    said = capsys.readouterr().out
    assert said.startswith("align on 8 x h100-80: --tp 4 --pp 2\n")
    rows = [line.split()[:3] for line in said.splitlines() if line[:5].strip().isdigit()]
    assert {(rank, role) for rank, role, part in rows if part == "experts"} == {
        ("0", "discriminator"), ("7", "discriminator")
    }  # fmt: skip
    for phrase in (
        "draw the answers", "score and train the discriminator", "update of the policy", "tensor parallel:",
        "500 steps:", "disk: a checkpoint", "assumed: NCCL", "estimated, no step was played", ": fits",
    ):  # fmt: skip
        assert phrase in said, phrase


def test_json_has_the_same_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: parts of a role sum to its totals, and floors are the largest of the times by roof."""
    assert main([*ALIGN, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    for rank in plan["memory"]["ranks"]:
        for role in rank["roles"].values():
            for name in ("parameters", "gradients", "optimizer"):
                assert sum(part[name] for part in role["parts"].values()) == role[name]
    for phase in plan["phases"]:
        assert phase["floor_seconds"] == max(phase["seconds"].values()) == phase["seconds"][phase["roof"]]
    assert plan["memory"]["fits"] and plan["layouts"] == []


def test_what_does_not_fit_is_said_and_is_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: status 1 and the reason; layouts that do fit are named where they are asked for."""
    assert main(["sft", "--model", "8B", "--tp", "2", "--gpus", "2", "--no-play", "--layouts", "1"]) == 1
    said = capsys.readouterr().out
    assert "does not fit: " in said and "in the step of the policy of rank 0" in said


def test_sizes_are_planned_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: without a stage the paper's three are planned, each in the fastest layout that fits."""
    assert main(["--model", "2B", "--gpus", "8", "--no-play", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [plan["stage"] for plan in plans] == ["sft", "align", "rlvr"]
    assert all(plan["memory"]["fits"] and plan["layouts"][0]["layout"] == plan["layout"] for plan in plans)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["sft", "--model", "4B", "--tp", "3", "--no-play"], "--tp 3 does not divide the model"),
        (["--model", "4B", "--gpu", "v100"], "--gpu v100 is not in the table"),
        (["--model", "5B", "--gpus", "8"], "there is no Qwen3-VL '5B'"),
    ],
)
def test_what_cannot_be_is_one_error(capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str) -> None:
    """Claim: a layout that the stage refuses, a device and a size that are not known end in one line."""
    assert main(flags) == PrismError.status
    assert complaint in capsys.readouterr().err
