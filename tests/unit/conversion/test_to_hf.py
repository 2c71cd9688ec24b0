"""Parts of files, written by whoever and in whatever order, make the folder that the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.conversion.checkpoints import to_hf as module
from prism_megatron.conversion.checkpoints.to_hf import HFPlan, plan_hf
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.errors import ConversionError
from tests.unit.conversion.disk import record_calls
from tests.unit.conversion.held import Held


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(7, 3), "b": torch.randn(2).bfloat16(), "c": torch.randn(40, 2), "d": torch.randn(5, 1, 2)}


def planned(held: dict[str, Tensor], dtype: torch.dtype | None = None, shard_bytes: int = 10**6) -> HFPlan:
    source: Any = Held(held)  # a checkpoint's source has the same methods
    return plan_hf(source, dtype=dtype, shard_bytes=shard_bytes)


@pytest.mark.parametrize(("unit_bytes", "chunk_bytes"), [(2**28, 2**24), (50, 2**24), (50, 17), (1, 1)])
@pytest.mark.parametrize(("dtype", "shard_bytes"), [(None, 10**6), (torch.bfloat16, 10**6), (torch.float32, 200)])
def test_parts_in_any_order_make_the_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    unit_bytes: int,
    chunk_bytes: int,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    """Claim: the last part may be written first, and all of them twice; each is on disk when it is done."""
    monkeypatch.setattr(module, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    plan = planned(tensors(), dtype, shard_bytes)
    plan.prepare(tmp_path)
    counted: list[int] = []
    calls = record_calls(monkeypatch)
    for part in [*reversed(plan.parts), plan.parts[0]]:
        calls.clear()
        part.run(tmp_path, counted.append)
        assert calls == [f"flush {tmp_path / part.file}"]
    assert sum(counted) == sum(part.num_bytes for part in (*plan.parts, plan.parts[0]))
    folder = HFFolder(tmp_path)
    assert list(folder.names()) == sorted(tensors())
    for name, tensor in tensors().items():
        assert torch.equal(folder.get(name), tensor.to(dtype or tensor.dtype)), name
        assert folder.get(name).dtype == (dtype or tensor.dtype)


def test_units_are_about_as_large_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: what an interruption costs is bounded, by a row more at most; a large tensor is cut between rows."""
    monkeypatch.setattr(module, "UNIT_BYTES", 100)
    parts = planned(tensors()).parts
    assert max(part.num_bytes for part in parts) <= 100
    assert len(parts) >= 5
    assert sum(part.num_bytes for part in parts) == sum(tensor.nbytes for tensor in tensors().values())


def test_infinity_is_written_where_it_was_and_nowhere_else(tmp_path: Path) -> None:
    """Claim: a number beyond fp16 is refused by name; infinities and NaNs of the source return."""
    infinite = torch.tensor([[1.0, -torch.inf], [torch.inf, torch.nan]])
    for number, refused in ((65504.0, False), (65519.0, False), (65520.0, True), (-1e30, True)):
        plan = planned({"x": torch.cat([infinite, torch.tensor([[0.0, number]])])}, torch.float16)
        plan.prepare(tmp_path)
        if refused:
            with pytest.raises(ConversionError, match=r"'x' holds numbers beyond 65504"):
                plan.parts[0].run(tmp_path, lambda _: None)
        else:
            plan.parts[0].run(tmp_path, lambda _: None)
            assert torch.equal(HFFolder(tmp_path).get("x")[:2].nan_to_num(5), infinite.half().nan_to_num(5))
