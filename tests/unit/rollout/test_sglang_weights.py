"""Weight updates over two servers: exact, checked beforehand, and on all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.sglang import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang_weights import Transport
from tests.unit.rollout.fake_sglang import FOLDER, KEY, FakeSGLang, running, unpack
from tests.unit.rollout.tiny_qwen import NoSegments
from tests.unit.rollout.weights import mini_weights

UPDATES = ("/update_weights_from_tensor", "/update_weights_from_disk")


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(image_token_id=498)) for _ in range(2)]


Attach = Callable[..., SGLangRollout]


@pytest.fixture
def attach(fakes: list[FakeSGLang], tmp_path: Path) -> Iterator[Attach]:
    engines: list[SGLangRollout] = []

    def build(servers: Any = None, **options: Any) -> SGLangRollout:
        engines.append(
            SGLangRollout(
                FOLDER,
                NoSegments(),
                urls=[fake.url for fake in fakes],
                api_key=KEY,
                end_token_ids=[488],
                spool=tmp_path,
                servers=servers,
                options=SGLangOptions(**options),
            )
        )
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()
    assert not list(tmp_path.iterdir()), "spooled weights were left behind"


def assert_holds(fake: FakeSGLang, factor: float, version: int) -> None:
    expected = dict(mini_weights(factor))
    assert fake.version == str(version) and not fake.session_open and not fake.paused
    assert fake.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(fake.weights[name], tensor), name


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_both_servers_hold_exactly_what_was_handed_over(
    transport: Transport, attach: Attach, fakes: list[FakeSGLang]
) -> None:
    engine = attach(transport=transport)
    for version, factor in ((1, 1.5), (2, 0.5)):
        engine.update_weights(mini_weights(factor), version)
        assert engine.policy_version == version
        for fake in fakes:
            assert_holds(fake, factor, version)
    for fake in fakes:
        last = [body for path, body in fake.calls if path in UPDATES][-1]
        assert last["flush_cache"] is True, "keys and values of the old weights would be used again"


def test_buckets_are_no_larger_than_asked_for(attach: Attach, fakes: list[FakeSGLang]) -> None:
    limit = 150_000
    attach(bucket_bytes=limit).update_weights(mini_weights(2.0), 0)
    bodies = [body for path, body in fakes[0].calls if path == UPDATES[0]]
    sizes = [[t.nbytes for t in unpack(body["serialized_named_tensors"][0]).values()] for body in bodies]
    assert len(sizes) > 5 and all(sum(bucket) <= limit or len(bucket) == 1 for bucket in sizes)
    assert any(sum(bucket) > limit for bucket in sizes), "blind: no tensor is larger than the limit"
    assert [body["flush_cache"] for body in bodies] == [False] * (len(bodies) - 1) + [True]
    assert_holds(fakes[1], 2.0, 0)


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


@pytest.mark.parametrize("path", ["/pause_generation", "/update_weights_from_tensor", "/end_weight_update"])
def test_a_server_that_dies_in_an_update_gets_the_new_weights_when_it_is_back(
    path: str, attach: Attach, fakes: list[FakeSGLang]
) -> None:
    """The update goes on without it: it is no failure, for its successor asks for the weights."""
    supervision = FakeSupervision(fakes)
    engine = attach(servers=supervision)
    engine.update_weights(mini_weights(2.0), 1)
    fakes[1].die_at = path
    engine.update_weights(mini_weights(3.0), 2)
    assert set(supervision.replaced) == {fakes[1].url} and engine.policy_version == 2
    assert_holds(fakes[0], 3.0, 2)
    fakes[1].restart()
    fakes[1].die_at = path
    with pytest.raises(WeightSyncError, match="lost again"):
        supervision.restarted(fakes[1].url)
    fakes[1].restart()
    calls_to_the_other = len(fakes[0].calls)
    supervision.restarted(fakes[1].url)
    assert_holds(fakes[1], 3.0, 2)
    assert len(fakes[0].calls) == calls_to_the_other, "a restored server is nobody else's business"


def test_a_server_of_nobodys_that_dies_in_an_update_is_a_failure(attach: Attach, fakes: list[FakeSGLang]) -> None:
    """The other goes back; as the dead one cannot, nothing is generated until both take an update."""
    engine = attach()
    engine.update_weights(mini_weights(2.0), 1)
    fakes[1].die_at = "/update_weights_from_tensor"
    with pytest.raises(WeightSyncError, match=f"{fakes[1].url} cannot be reached"):
        engine.update_weights(mini_weights(3.0), 2)
    assert engine.policy_version is None
    fakes[1].restart()
    engine.update_weights(mini_weights(3.0), 3)
    for fake in fakes:
        assert_holds(fake, 3.0, 3)


def renamed(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name.replace("visual.blocks.1.mlp", "visual.block.1.mlp"), tensor


def sharded(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, tensor[: len(tensor) // 2] if name.endswith("layers.2.mlp.down_proj.weight") else tensor


def without_vision(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in weights if "visual" not in name)


def twice(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        yield name, tensor
        yield name, tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "no weight 'model.visual.block.1.mlp"),
        (sharded, r"layers.2.mlp.down_proj.weight' has shape .* gathered"),
        (without_vision, "weights of the rollout model were not sent: model.visual"),
        (twice, "sent twice"),
    ],
)
def test_wrong_weights_are_refused_before_anything_is_sent(
    change: Callable[[Iterator[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]],
    message: str,
    attach: Attach,
    fakes: list[FakeSGLang],
) -> None:
    engine = attach()
    engine.update_weights(mini_weights(2.0), 1)
    for fake in fakes:
        fake.calls.clear()
    with pytest.raises(WeightSyncError, match=message):
        engine.update_weights(change(mini_weights()), 2)
    for fake in fakes:
        assert not fake.calls
        assert_holds(fake, 2.0, 1)
    assert engine.policy_version == 1


def test_a_tied_head_may_be_handed_over_too(attach: Attach) -> None:
    """An export that lists it is accepted; servers copy the embedding anyway."""
    weights = dict(mini_weights())
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    engine = attach()
    engine.update_weights(iter(weights.items()), 4)
    assert engine.policy_version == 4


@pytest.mark.parametrize(
    ("transport", "path"),
    [
        ("tensor", "/begin_weight_update"),  # phase one
        ("tensor", "/update_weights_from_tensor"),
        ("tensor", "/end_weight_update"),
        ("disk", "/update_weights_from_disk"),
    ],
)
def test_when_one_server_fails_all_keep_the_last_good_version(
    transport: Transport, path: str, attach: Attach, fakes: list[FakeSGLang]
) -> None:
    engine = attach(transport=transport)
    engine.update_weights(mini_weights(2.0), 1)
    fakes[1].refuse[path] = 1
    with pytest.raises(WeightSyncError, match=f"{path} was refused"):
        engine.update_weights(mini_weights(3.0), 2)
    for fake in fakes:
        assert_holds(fake, 2.0, 1)
    assert engine.policy_version == 1
    engine.update_weights(mini_weights(3.0), 2)
    for fake in fakes:
        assert_holds(fake, 3.0, 2)


def test_servers_that_cannot_go_back_are_not_used(attach: Attach, fakes: list[FakeSGLang]) -> None:
    engine = attach()
    engine.update_weights(mini_weights(2.0), 1)
    fakes[1].refuse["/update_weights_from_tensor"] = 2
    with pytest.raises(WeightSyncError, match="could not go back to version 1"):
        engine.update_weights(mini_weights(3.0), 2)
    assert engine.policy_version is None
    engine.update_weights(mini_weights(3.0), 2)
    assert engine.policy_version == 2


def test_a_server_that_holds_other_weights_after_an_update_is_found(attach: Attach, fakes: list[FakeSGLang]) -> None:
    """The checksum's claim: an update that a server passes over in silence does not go unseen."""
    engine = attach()
    engine.update_weights(mini_weights(2.0), 1)
    del fakes[1].weights["model.visual.merger.norm.weight"]
    with pytest.raises(WeightSyncError, match="hold different weights"):
        engine.update_weights(mini_weights(3.0), 2)
