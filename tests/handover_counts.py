"""What one rank gathers, sends and writes in a hand-over, counted where it does so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from prism_megatron.rollout.sglang import weights as sglang_weights
from prism_megatron.rollout.sglang.weight_group import WeightGroups
from prism_megatron.rollout.weight_buckets import Payload, Piece
from prism_megatron.rollout.weight_spool import Spool


@dataclass
class Counts:
    """Bytes of weights."""

    gathered: int = 0
    """received from other ranks"""
    sent: int = 0
    """to all servers together"""
    written: int = 0


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts of this process inside; written ones go on to be counted until all of it is on the disk."""
    counts = Counts()
    gather, all_gather, broadcast = dist.gather, dist.all_gather_into_tensor, dist.broadcast
    send, add, payload, post = WeightGroups.send, Spool.add, Payload.__init__, sglang_weights._post_payload

    def gathered(mine: Tensor, parts: list[Tensor] | None = None, **how: Any) -> Any:
        counts.gathered += 0 if parts is None else sum(part.nbytes for part in parts) - mine.nbytes
        return gather(mine, parts, **how)

    def all_gathered(whole: Tensor, mine: Tensor, **how: Any) -> Any:
        counts.gathered += whole.nbytes - mine.nbytes
        return all_gather(whole, mine, **how)

    def broadcasted(tensor: Tensor, **how: Any) -> Any:
        if tensor.is_floating_point() and how.get("group_src") != dist.get_rank(how["group"]):
            counts.gathered += tensor.nbytes
        return broadcast(tensor, **how)

    def sent_by_group(groups: WeightGroups, client: Any, parcel: Any, *rest: Any, **how: Any) -> Any:
        counts.sent += parcel.raw.nbytes
        return send(groups, client, parcel, *rest, **how)

    def packed(self: Payload, piece: Piece) -> None:
        payload(self, piece)
        self.weight_bytes = piece.num_bytes  # type: ignore[attr-defined]

    def posted(client: Any, **how: Any) -> Any:
        counts.sent += how["payload"].weight_bytes
        return post(client, **how)

    def added(spool: Spool, tensors: Sequence[tuple[str, Tensor]]) -> None:
        counts.written += sum(tensor.nbytes for _, tensor in tensors)
        add(spool, tensors)

    with (
        mock.patch.multiple(dist, gather=gathered, all_gather_into_tensor=all_gathered, broadcast=broadcasted),
        mock.patch.object(WeightGroups, "send", sent_by_group),
        mock.patch.object(Payload, "__init__", packed),
        mock.patch.object(sglang_weights, "_post_payload", posted),
        mock.patch.object(Spool, "add", added),
    ):
        yield counts
