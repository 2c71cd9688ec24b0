"""What two fake servers are sent in a weight update, and what they hold afterwards."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch

from prism_megatron.conversion.announced_weights import AnnouncedWeights
from prism_megatron.rollout.sglang.engine import SGLangRollout
from prism_megatron.rollout.sglang.weights import Transport
from tests.unit.rollout.fake_sglang import UPDATES, FakeSGLang
from tests.unit.rollout.weights import mini_weights

BY_TENSOR, BY_GROUP, _ = UPDATES
PATH_OF: dict[Transport, str] = {"tensor": BY_TENSOR, "group": BY_GROUP}
VISION = frozenset(name for name, _ in mini_weights() if ".visual." in name)

Attach = Callable[..., SGLangRollout]


def assert_holds(fake: FakeSGLang, factor: float, version: int) -> None:
    expected = dict(mini_weights(factor))
    assert fake.version == str(version) and not fake.session_open and not fake.paused
    assert fake.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(fake.weights[name], tensor), name


def announced(factor: float, *, left_out: AbstractSet[str] = frozenset()) -> AnnouncedWeights:
    """As an engine exports them: names and shapes first."""
    weights = {name: tensor for name, tensor in mini_weights(factor) if name not in left_out}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return AnnouncedWeights(shapes, iter(weights.items()), left_out=left_out)
