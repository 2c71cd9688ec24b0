"""Lines of records and of preference pairs, damaged in their structure and in their bytes."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from prism_megatron.data.loader import RecordSource
from prism_megatron.data.pairs import PairSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import response_text
from prism_megatron.data.tokenizer import save_mini_processing
from tests.fuzz.damage import damaged
from tests.fuzz.harness import Case, Kind
from tests.fuzz.images import picture

RECORD: dict[str, Any] = {
    "id": "r-1", "image": "image.png", "question": "Which é?", "choices": ["C", "two"], "answer": "B",
    "answer_type": "choice", "solution": "It is two.", "caption": "A picture.", "source": "set/dev",
}  # fmt: skip
PAIR: dict[str, Any] = {
    "id": "p-1", "image": "image.png", "question": "Which é?", "chosen": response_text("a", "b", "c"),
    "rejected": [response_text("x", "y", "z"), response_text("u", "v", "w")], "source": "set",
}  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 2.5, 1e308, 10**30, "", " ", "\n", "x" * 5000, "\0", "\ud800", "é", "\u2028", "A", "3",
    [], [[]], ["a"], ["a", "b"], ["a", 1], [None], {}, {"path": "image.png"}, {"a": {"b": []}}, "<|im_end|>",
    "<|image_pad|>", "a<|im_start|>system", "<think>", "</answer>", "<caption>a</caption>", "../image.png",
    "/etc/hostname", ".", "image.png/", "a" * 300, "mathvision/x", "missing.png", "choice", "bool", "float",
]  # fmt: skip
_RAW = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"[" * 200000, b"01", b"'a'", b"tru",
        b"\xff", b"\xe9", b"\xed\xa0\x80", b'"\\u12"', b'"\\ud800"', b"/* */ 1", b"1,", b"")  # fmt: skip
_ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "cp1252", "utf-7")

_OPTIONS: dict[str, Any] = {"part": "train", "seed": 0, "batch_size": 1, "max_prompt_tokens": 200,
                            "max_response_tokens": 200, "validation_share": 0.0}  # fmt: skip


def make_record(rng: random.Random) -> Case:
    """A file of ``data.jsonl`` with a good line and a damaged one."""
    return _case(RECORD, rng)


def make_pair(rng: random.Random) -> Case:
    """The same of preference pairs."""
    return _case(PAIR, rng)


def read_records(path: Path) -> None:
    """As a run does, with the tokenizer."""
    _add_image(path.parent)
    RecordSource(path.parent, renderer(), **_OPTIONS).batch(0)


def read_pairs(path: Path) -> None:
    """As :func:`read_records`."""
    _add_image(path.parent)
    PairSource(path, renderer(), **_OPTIONS).batch(0)


RECORDS = Kind("lines of records", "data.jsonl", make_record, read_records)
PAIRS = Kind("lines of pairs", "pairs.jsonl", make_pair, read_pairs)


@functools.cache
def renderer() -> Renderer:
    """The mini world's, made once."""
    with tempfile.TemporaryDirectory() as folder:
        save_mini_processing(Path(folder))
        return Renderer.from_folder(folder)


@functools.cache
def _add_image(folder: Path) -> None:
    picture("RGB").resize((32, 32)).save(folder / "image.png")


def _case(good: dict[str, Any], rng: random.Random) -> Case:
    label, line = rng.choice((_other_value, _other_keys, _raw_value, _doubled_key, _damaged_bytes))({**good}, rng)
    others = [json.dumps({**good, "id": f"good-{i}"}).encode() for i in range(rng.randint(0, 2))]
    lines = [*others, line]
    rng.shuffle(lines)
    data = rng.choice((b"\n", b"\n\n", b"\r\n")).join(lines)
    if rng.random() < 0.1:
        encoding = rng.choice(_ENCODINGS)
        return Case(f"{label}, in {encoding}", data.decode("utf-8", "replace").encode(encoding, "replace"))
    return Case(label, data)


def _other_value(line: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(list(line))
        line[key] = rng.choice(_VALUES)
    return f"another {key}", json.dumps(line).encode()


def _other_keys(line: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    key = rng.choice(list(line))
    if rng.random() < 0.5:
        del line[key]
    if rng.random() < 0.5:
        line[rng.choice((key.upper(), f"{key} ", "extra", ""))] = rng.choice(_VALUES)
    return "other keys", json.dumps(line).encode()


def _raw_value(line: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    """A value that is no JSON, or beyond what numbers and nesting may be."""
    key, raw = rng.choice(list(line)), rng.choice(_RAW)
    line[key] = "HERE"
    return f"raw {raw[:12]!r}", json.dumps(line).encode().replace(b'"HERE"', raw)


def _doubled_key(line: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    key = rng.choice(list(line))
    again = json.dumps({key: rng.choice([line[key], *_VALUES])})[1:-1]
    return f"{key} twice", (json.dumps(line)[:-1] + ", " + again + "}").encode()


def _damaged_bytes(line: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    return "damaged bytes", damaged(json.dumps(line, ensure_ascii=rng.random() < 0.5).encode(), rng)
