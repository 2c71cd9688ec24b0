"""Ways to damage bytes that know nothing of what the bytes mean."""

from __future__ import annotations

import random

_HEADER = 64
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """``data`` after one to three of the ways below."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(WAYS)(data, rng)
    return data


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bytes are others."""
    return _flipped(data, rng, end=len(data))


def flipped_early(data: bytes, rng: random.Random) -> bytes:
    """A few of the first bytes, where headers are, are others."""
    return _flipped(data, rng, end=min(len(data), _HEADER))


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data) + 1)]


def removed(data: bytes, rng: random.Random) -> bytes:
    """Some bytes in the middle are missing."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randint(1, 32) :]


def inserted(data: bytes, rng: random.Random) -> bytes:
    """Some bytes more, random ones or a piece of the same data."""
    start, length = rng.randrange(len(data) + 1), rng.randint(1, 64)
    piece = rng.randbytes(length) if rng.random() < 0.5 else data[start : start + length]
    return data[:start] + piece + data[start:]


def extreme(data: bytes, rng: random.Random) -> bytes:
    """A number of 2 or 4 bytes is the least, the largest or one near a sign bit."""
    width, order = rng.choice((2, 4)), rng.choice(("little", "big"))
    start = rng.randrange(max(1, min(len(data), rng.choice((_HEADER, 4 * _HEADER, len(data))))))
    number = (rng.choice(_EXTREMES) % (1 << 8 * width)).to_bytes(width, "little" if order == "little" else "big")
    return data[:start] + number + data[start + width :]


WAYS = (flipped, flipped_early, cut, removed, inserted, extreme)


def _flipped(data: bytes, rng: random.Random, *, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if end:
            changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)
