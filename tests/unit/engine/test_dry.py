"""The watch over a step and the table of answers, without a model. (Whole steps: ``tests/integration``.)"""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from prism_megatron.engine.dry.answers import ANSWERS, KNOWN_WAITS, balanced_map
from prism_megatron.engine.dry.watch import HostWaitError, MixedDevicesError, Watch
from prism_megatron.engine.host.cpu import Patch
from prism_megatron.parallel.host_to_device import on_device

DEVICE = torch.device("lazy", 0)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: f"{answer.module}.{answer.name}")
def test_every_answer_is_documented_and_aims_at_something(answer: Patch) -> None:
    """Claim: place, versions, reason and end are filled in, and upstream still has the name."""
    assert all((answer.upstream, answer.versions, answer.reason, answer.until))
    owner = importlib.import_module(answer.module)
    for part in answer.name.split("."):
        owner = getattr(owner, part)


def test_known_waits_are_where_the_table_says() -> None:
    """Claim: the calls that wait, and which answers stand in for, are in Megatron's source as named."""
    for module, name in KNOWN_WAITS:
        assert hasattr(importlib.import_module(module), name.split(".")[0])
    assert "recv_prev_shape_tensor.tolist()" in inspect.getsource(p2p_communication)
    assert "masked_select(routing_map)" in inspect.getsource(moe_utils)
    assert "d2h_event.synchronize()" in inspect.getsource(token_dispatcher)


def test_storages_are_counted_once_and_for_as_long_as_they_live() -> None:
    """Claim: on fakes as on real tensors, views count nothing, and the peak keeps what has gone."""

    def counts(device: torch.device) -> tuple[int, ...]:
        with Watch(device.type) as watch:
            kept = torch.zeros(10, device=device)
            view = kept.view(2, 5)
            before = watch.begin_peak()
            wide = kept.double()
            during = watch.held
            del wide
            view.add_(1.0)
            return before, during, watch.held, watch.peak()

    real = counts(torch.device("cpu"))
    with FakeTensorMode():
        assert counts(DEVICE) == real == (40, 120, 40, 120)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, _: x.sum().item(),
        lambda x, _: x.tolist(),
        lambda x, _: bool(x.sum() > 0),
        lambda x, _: x.cpu(),
        lambda x, _: x[x > 0],
        lambda x, _: x.nonzero(),
        lambda _, host: host.to(DEVICE),
        lambda x, host: x.copy_(host),
    ],
    ids=["item", "tolist", "bool", "cpu", "mask", "nonzero", "to", "copy"],
)
def test_waiting_inside_a_pass_is_refused(wait: object) -> None:
    """Claim: each of these makes the host wait for a GPU, and raises in a pass."""
    assert callable(wait)
    with FakeTensorMode(), Watch("lazy") as watch:
        x, host = torch.zeros(4, device=DEVICE), torch.zeros(4)
        with watch.passing(), pytest.raises(HostWaitError, match="wait for the device"):
            wait(x, host)
        assert on_device(host, DEVICE).device == DEVICE


def test_a_copy_that_runs_by_itself_and_a_fill_by_a_mask_are_allowed() -> None:
    """Claim: what does not wait does not raise."""
    with FakeTensorMode(), Watch("lazy") as watch, watch.passing():
        x = on_device(torch.zeros(4), DEVICE)
        x[x > 0] = 1.0
        assert x.shape == (4,)


@pytest.mark.parametrize("indexed", [False, True], ids=["sum", "index"])
def test_tensors_of_two_devices_do_not_meet(indexed: bool) -> None:
    """Claim: a sum of both raises, and so does an index of one into the other, which torch would let pass."""
    with FakeTensorMode(), Watch("lazy"):
        x, host = torch.zeros(4, device=DEVICE), torch.zeros(4, dtype=torch.int64)
        with pytest.raises(MixedDevicesError, match="cpu and lazy"):
            x[host] if indexed else x + host


def test_an_error_names_the_line() -> None:
    """Claim: the innermost line of the project's code, with its text."""
    from prism_megatron.losses.reduction import masked_sum

    with (
        FakeTensorMode(),
        Watch("lazy"),
        pytest.raises(MixedDevicesError, match=r"reduction\.py:\d+: return values\.masked"),
    ):
        masked_sum(torch.zeros(4, device=DEVICE), torch.zeros(4))


def test_a_balanced_routing_gives_every_expert_the_same() -> None:
    """Claim: each token chooses as many different experts as it may, and loads differ by one token at most."""
    chosen = balanced_map(30, 8, 3)
    assert chosen.sum(1).tolist() == [3] * 30
    loads = chosen.sum(0)
    assert int(loads.max() - loads.min()) <= 1
