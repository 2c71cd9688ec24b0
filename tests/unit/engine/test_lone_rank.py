"""A group of one calls no collective, and finds in its output what the collective would have put there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.engine.host.lone_rank import nothing_alone


class Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


class Collective:
    """Notes its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, output: Tensor, given: Tensor, **settings: Any) -> str:
        self.calls.append({"output": output, "given": given, **settings})
        return "handle"

    __name__ = "collective"


def test_a_lone_rank_keeps_its_tensor() -> None:
    collective, tensor = Collective(), torch.arange(4.0)
    assert nothing_alone(collective)(tensor, tensor[:4], group=Group(1), async_op=False) is None
    assert not collective.calls
    assert torch.equal(tensor, torch.arange(4.0))


def test_a_lone_rank_copies_to_another_place() -> None:
    output = torch.zeros(4)
    nothing_alone(Collective())(output, torch.arange(4.0), group=Group(1))
    assert torch.equal(output, torch.arange(4.0))


@pytest.mark.parametrize(("size", "asynchronous"), [(2, False), (2, True), (1, True)])
def test_others_and_those_who_wait_for_a_handle_call_it(size: int, asynchronous: bool) -> None:
    collective, output, given = Collective(), torch.zeros(4), torch.ones(4)
    group = Group(size)
    assert nothing_alone(collective)(output, given, group=group, async_op=asynchronous, op="sum") == "handle"
    (call,) = collective.calls
    assert call["output"] is output
    assert call["given"] is given
    assert (call["group"], call["async_op"], call["op"]) == (group, asynchronous, "sum")
