"""``convert.py inspect`` of a checkpoint of training: what belongs to which role, counted by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from prism_megatron.config.check import InspectConfig
from prism_megatron.jobs.inspect_folder import inspect_folder, text
from tests.unit.conversion.folders import checkpoint_of

TENSORS = {
    "policy.a": torch.zeros(3, 2),
    "policy.b": torch.zeros(5, dtype=torch.bfloat16),
    "discriminator.a": torch.zeros(7, dtype=torch.bfloat16),
    "optimizer.state.exp_avg.policy.a": torch.zeros(3, 2),
    "optimizer.state.exp_avg.discriminator.a": torch.zeros(7),
    "optimizer.state.exp_avg_sq.discriminator.a": torch.zeros(7),
}


def test_each_role_is_told_with_its_own(tmp_path: Path) -> None:
    """Claim: weights, optimizer state, their bytes and counts of steps are the role's own; Adam's count is not that of
    the steps, because a step may be skipped."""
    engines = {
        "policy": {"steps_taken": 9, "adam_step": 8},
        "discriminator": {"steps_taken": 4, "adam_step": 3},
    }
    checkpoint_of(tmp_path, TENSORS, engines)
    facts = inspect_folder(InspectConfig(str(tmp_path)))
    assert facts["kind"] == "checkpoint of training"
    assert facts["state"] == {"step": 11}
    assert facts["chunks"] == "6 for 6 tensors, at most 1 for one"
    assert facts["policy"]["weights"] == {
        "tensors": 2, "parameters": 11, "bytes": 6 * 4 + 5 * 2, "formats": "bfloat16 (1), float32 (1)",
    }  # fmt: skip
    assert facts["policy"]["optimizer"] == {
        "tensors": 1, "parameters": 6, "bytes": 24, "formats": "float32 (1)", "steps taken": 9, "Adam's count": 8,
    }  # fmt: skip
    assert facts["discriminator"]["weights"]["bytes"] == 14
    assert facts["discriminator"]["optimizer"]["tensors"] == 2
    assert facts["discriminator"]["optimizer"]["Adam's count"] == 3
    assert "    steps taken: 9" in text(facts).splitlines()
