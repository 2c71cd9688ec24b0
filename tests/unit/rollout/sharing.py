"""Two engines in one process that share updates of two fake servers, as two ranks of a world do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from prism_megatron.conversion.announced_weights import WeightShare
from prism_megatron.rollout.sglang.engine import SGLangRollout
from prism_megatron.rollout.sglang.share_sender import Sent
from tests.unit.rollout.attached import attached
from tests.unit.rollout.fake_sglang import FakeSGLang
from tests.unit.rollout.weights import mini_weights

NAMES = tuple(name for name, _ in mini_weights())
SHARES = (frozenset(NAMES[0::2]), frozenset(NAMES[1::2]))
"""Names of what the first engine brings, which opens and ends updates, and of what the second does."""


def share_of(weights: Mapping[str, Tensor], part: int, *, left_out: AbstractSet[str] = frozenset()) -> WeightShare:
    """What engine ``part`` brings of the weights, without those ``left_out``."""

    def shapes(names: AbstractSet[str]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weights[name].shape) for name in NAMES if name in names - left_out}

    own = shapes(SHARES[part])
    tensors: Iterator[tuple[str, Tensor]] = ((name, weights[name]) for name in own)
    return WeightShare(
        shapes(frozenset(NAMES)),
        tensors,
        left_out=left_out,
        own_shapes=own,
        own_left_out=SHARES[part] & left_out,
    )


class Together:
    """What ``SharedRollout`` does over ranks; agreements are calls."""

    def __init__(self, fakes: Sequence[FakeSGLang], spool: Path, *, servers: Any = None, **options: Any) -> None:
        self.first = attached(fakes, spool, servers=servers, **options)
        self.second = attached(fakes[::-1], spool, **options)
        self.engines: tuple[SGLangRollout, ...] = (self.first, self.second)
        self.sent: list[Sent] = []

    def update(self, factor: float, version: int, *, left_out: AbstractSet[str] = frozenset()) -> None:
        """Hand the mini's weights over, times ``factor``; both engines send at once. Raises as the first one."""
        weights = dict(mini_weights(factor))
        shares = [share_of(weights, part, left_out=left_out) for part in (0, 1)]
        update = self.first.open_update(shares[0], version)
        with ThreadPoolExecutor(2) as ranks:
            sending = [
                ranks.submit(engine.send_share, update, share, part=part, keeps_last=part == 0)
                for part, (engine, share) in enumerate(zip(self.engines, shares, strict=True))
            ]
            self.sent = [one.result() for one in sending]
        try:
            self.first.finish_update(update, shares[0], self.sent)
        finally:
            self.second.follow(self.first.policy_version)

    def close(self) -> None:
        self.second.close()
        self.first.close()
