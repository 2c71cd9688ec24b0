"""The same records in every format, written here by hand: what adapters read has to come to the same conversations."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.conversation import Conversation, Picture
from prism_megatron.data.formats.detect import open_corpus
from prism_megatron.data.formats.files.base import Corpus
from prism_megatron.data.records import Purpose, Record, read_records

USER: dict[str, Any] = {"role": "user", "content": "<image>Why?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "So."}
CHAT: dict[str, Any] = {"messages": [USER, ANSWER], "images": ["images/1.png"]}
Seen = tuple[str, str, str | None, list[tuple[str, list[str]]]]


def seen(conversation: Conversation) -> Seen:
    """All of it, with hashes of images in their places, however they are stored."""
    turns: list[tuple[str, list[str]]] = [
        (turn.role, [_part(part) for part in turn.parts]) for turn in conversation.turns
    ]
    return conversation.id, conversation.source, conversation.answer, turns


def _part(part: str | Picture) -> str:
    return f"image {hashlib.sha256(data_of(part)).hexdigest()}" if isinstance(part, Picture) else f"text {part}"


def data_of(picture: Picture) -> bytes:
    return picture.stored if isinstance(picture.stored, bytes) else picture.stored.read_bytes()


def read_all(corpus: Corpus) -> list[Conversation]:
    return [corpus.read(shard, place) for shard in corpus.shards() for place in corpus.scan(shard)]


def read_set(path: Path, *, purpose: Purpose = "train", **settings: Any) -> list[Conversation]:
    return read_all(open_corpus(path, FormatConfig(**settings), purpose=purpose))


def png(shade: int, *, size: tuple[int, int] = (40, 32), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 99)).save(stream, format=kind)
    return stream.getvalue()


def synthetic(folder: Path, *, count: int = 20, tagged: bool = True) -> Path:
    """A folder of ours with awkward texts: line ends, other scripts, signs that JSON escapes, tags' own letters."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        name = f"images/{i:02d}.{'jpg' if i % 3 == 0 else 'png'}"
        (folder / name).write_bytes(png(i, size=(32 + i, 40), kind="JPEG" if i % 3 == 0 else "PNG"))
        choices = ['a "quoted" one', "two\\three"] if i % 4 == 0 else None
        lines.append({
            "id": f"own-{i}", "image": name, "choices": choices,
            "question": f"Wie viele? 多少\u2028 {i}\n\t< caption >",
            "answer": "B" if choices else str(i), "answer_type": "choice" if choices else "integer",
            "solution": f"I count.\n\nThere are {i}." if tagged else None,
            "caption": f"- circles: {i}\n- é" if tagged else None, "source": f"own/{i % 2}",
        })  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=i % 2 == 0) + "\n" for i, line in enumerate(lines))
    (folder / "data.jsonl").write_text(text, encoding="utf-8")
    return folder


def real(shared: Path, folder: Path, name: str) -> Path:
    """The first 20 records of a real set, as a folder of its own."""
    source = shared / "data" / name
    (folder / "images").mkdir(parents=True)
    with (source / "data.jsonl").open("rb") as file:
        lines = [next(file) for _ in range(20)]
    for line in lines:
        image = json.loads(line)["image"]
        shutil.copy(source / image, folder / image)
    (folder / "data.jsonl").write_bytes(b"".join(lines))
    return folder


def response_of(record: Record) -> str:
    """The one layout, written down once more."""
    if record.caption is None or record.solution is None:
        return record.answer
    seen_first = f"<caption>\n{record.caption}\n</caption>\n"
    return f"{seen_first}<think>\n{record.solution}\n</think>\n<answer>{record.answer}</answer>"


def _own(record: Record) -> dict[str, Any]:
    return {"id": record.id, "source": record.source, "answer": record.answer}


def _copy_images(records: Sequence[Record], folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for record in records:
        shutil.copy(record.image, folder / "pictures" / record.image.name)


def write_messages(records: Sequence[Record], folder: Path) -> Path:
    """LLaMA-Factory's form, a JSON array."""
    _copy_images(records, folder)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<image>{record.question_text}"},
                {"role": "assistant", "content": response_of(record)},
            ],
            "images": [f"pictures/{record.image.name}"],
            **_own(record),
        }
        for record in records
    ]
    (folder / "train.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder / "train.json"


def write_conversations(records: Sequence[Record], folder: Path) -> Path:
    """ShareGPT's form, one object a line."""
    _copy_images(records, folder)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for record in records:
            turns = [
                {"from": "human", "value": f"<image>{record.question_text}"},
                {"from": "gpt", "value": response_of(record)},
            ]
            row = {"conversations": turns, "image": f"pictures/{record.image.name}", **_own(record)}
            file.write(json.dumps(row) + "\n")
    return folder


def parquet(rows: Sequence[dict[str, Any]], path: Path, *, group: int = 7) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
    return path


def _struct(record: Record) -> dict[str, Any]:
    return {"bytes": record.image.read_bytes(), "path": record.image.name}


def write_columns(records: Sequence[Record], folder: Path) -> Path:
    """Hugging Face's form: two Parquet files with a struct of bytes and path, under other names."""
    rows = [
        {
            **_own(record),
            "problem": record.question,
            "options": None if record.choices is None else list(record.choices),
            "image": _struct(record),
            "caption": record.caption,
            "rationale": record.solution,
        }
        for record in records
    ]
    for number, part in enumerate((rows[:9], rows[9:])):
        parquet(part, folder / "data" / f"train-{number:05d}-of-00002.parquet")
    parquet(rows[:1], folder / "data" / "test-00000-of-00001.parquet")
    return folder


def _verl(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "data_source": record.source,
        "prompt": [{"role": "user", "content": f"<image>{record.question_text}"}],
        "images": [_struct(record)],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": record.answer},
        "extra_info": {"split": "train", "index": 3},
    }


def write_verl(records: Sequence[Record], folder: Path) -> Path:
    return parquet([_verl(record) for record in records], folder / "train.parquet")


def write_prism(records: Sequence[Record], folder: Path) -> Path:
    """Tags around the parts, and every second record with a whole response only."""
    rows = []
    for i, record in enumerate(records):
        caption, rest = response_of(record).split("\n<think>", 1)
        whole = {"teacher_response": response_of(record), "teacher_caption": None, "teacher_cot": None}
        parts = {"teacher_response": None, "teacher_caption": caption, "teacher_cot": f"<think>{rest}"}
        rows.append({**_verl(record), **(whole if i % 2 else parts)})
    return parquet(rows, folder / "rl.parquet")


def write_tars(records: Sequence[Record], folder: Path, *, per_shard: int = 8) -> Path:
    """Shards as the standard library writes tars, in a subfolder; images before and after their JSON."""
    (folder / "shards").mkdir(parents=True)
    for first in range(0, len(records), per_shard):
        with tarfile.open(folder / "shards" / f"shard_{first:06d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for i, record in enumerate(records[first : first + per_shard], start=first):
                turns = [
                    {"role": "user", "content": f"<image>{record.question_text}"},
                    {"role": "assistant", "content": response_of(record)},
                ]
                parts = [
                    ("json", json.dumps({"messages": turns, **_own(record)}).encode()),
                    (record.image.suffix[1:], record.image.read_bytes()),
                ]
                key = f"folder.x/{'long' * 40 if i == 3 else 'k'}{i}"
                for part, data in parts if i % 2 else reversed(parts):
                    add(tar, f"{key}.{part}", data)
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_energon(records: Sequence[Record], folder: Path) -> Path:
    """What Energon's own preparation writes beside shards."""
    write_tars(records, folder)
    meta = folder / ".nv-meta"
    meta.mkdir()
    names = [f"shards/{path.name}" for path in sorted((folder / "shards").iterdir())]
    counts = {name: min(8, len(records) - 8 * i) for i, name in enumerate(names)}
    info = {"energon_version": "7.4.1", "shard_counts": counts}
    (meta / ".info.json").write_text(json.dumps(info))
    listed = ["shards/shard_0000{00,08}.tar", *names[2:]] if len(names) > 1 else names
    (meta / "split.yaml").write_text(json.dumps({"split_parts": {"train": listed, "val": []}, "exclude": []}))
    return folder


WRITERS: dict[str, Callable[[Sequence[Record], Path], Path]] = {
    "sharegpt": write_messages,
    "sharegpt of lines": write_conversations,
    "columns": write_columns,
    "verl": write_verl,
    "prism": write_prism,
    "webdataset": write_tars,
    "energon": write_energon,
}


def records_of(folder: Path) -> tuple[Record, ...]:
    return read_records(folder, purpose="evaluate")
