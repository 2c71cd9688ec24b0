"""Which data a run trains on, in a few words that a checkpoint keeps: another set, order or batch is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Identity = Mapping[str, Any]
"""What JSON can hold: ``flag`` that names the data, ``count``, ``digest`` and ``batch_size``."""


def identity_of(flag: str, parts: Iterable[tuple[str, Sequence[int]]], *, batch_size: int) -> Identity:
    """Of (text, tokens) in their order: ids and questions with what is to be answered.

    Two equal digests (SHA-256) are the same texts in the same order. Blind to the pixels of images.
    """
    digest, count = hashlib.sha256(), 0
    for text, tokens in parts:
        count += 1
        for piece in (text.encode("utf-8", "surrogatepass"), ",".join(map(str, tokens)).encode("ascii")):
            digest.update(len(piece).to_bytes(8, "little") + piece)
    return {"flag": flag, "count": count, "digest": digest.hexdigest(), "batch_size": batch_size}


def what_differs(before: Identity, now: Identity) -> str | None:
    """How two of them differ, in words; None where they are equal."""
    if before == now:
        return None
    if before["flag"] != now["flag"]:
        return f"it trained on --{before['flag']}, and now on --{now['flag']}"
    found = []
    if before["batch_size"] != now["batch_size"]:
        found.append(f"batches of {before['batch_size']} are now of {now['batch_size']}")
    if before["count"] != now["count"]:
        found.append(f"there were {before['count']} examples and are {now['count']}")
    elif before["digest"] != now["digest"]:
        found.append("there are as many examples as before, but not the same ones in the same order")
    return " and ".join(found)
