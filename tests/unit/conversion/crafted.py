"""Files that would run something, or change something for good, if they were read as what they pretend to be.

The ones that run something make the folder ``CANARY`` where the process is.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

CANARY = "ran"
"""A place in the folder of the process."""

METADATA = "torch.distributed.checkpoint.metadata"
EMPTY = pickle.dumps({}, protocol=2)


class Call:
    """Pickled, a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def of(value: Any) -> bytes:
    """The opcodes that push ``value``."""
    return pickle.dumps(value, protocol=2)[2:-1]


def program(*opcodes: bytes, protocol: int = 2) -> bytes:
    """A pickle of these opcodes."""
    return bytes([0x80, protocol]) + b"".join(opcodes) + b"."


def index(**fields: Any) -> Metadata:
    """An index of nothing."""
    return Metadata(state_dict_metadata={}, storage_data={}, **fields)


MKDIR = named("posix", "mkdir")


def called(function: bytes = MKDIR, argument: str = CANARY) -> bytes:
    """Opcodes that call ``function`` and leave its result."""
    return function + text(argument) + b"\x85R"


def split_name(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which walks from attribute to attribute."""
    return text(module) + text(name) + b"\x93"


EXTENSION = 241
"""A code that tests register for ``os.mkdir``, and use once: pickle keeps what it found for it, and asks nobody."""

RUNNING: dict[str, bytes] = {
    **{f"protocol {n}": pickle.dumps(Call(os.mkdir, CANARY), protocol=n) for n in range(6)},
    "a process": pickle.dumps(Call(os.system, f"mkdir {CANARY}")),
    "a class that starts a process": pickle.dumps(Call(subprocess.call, ["mkdir", CANARY])),
    "code": pickle.dumps(Call(exec, f"import os; os.mkdir({CANARY!r})")),
    "the name that Python 2 had": program(called(named("__builtin__", "eval"), f"__import__('os').mkdir({CANARY!r})")),
    "a pickle in a pickle": pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.mkdir, CANARY)))),
    "attributes taken one by one": program(
        called(
            called(named("operator", "attrgetter"), "mkdir")
            + called(named("importlib", "import_module"), "os") + b"\x85R"
        )
    ),
    "INST": program(b"(" + text(CANARY) + b"iposix\nmkdir\n"),
    "OBJ": program(b"(" + MKDIR + text(CANARY) + b"o"),
    "NEWOBJ of a class with code": program(called(), b"0", named("functools", "partial"), MKDIR, b"\x85\x81"),
    "NEWOBJ_EX": program(called(), b"0", named("functools", "partial"), MKDIR, b"\x85}\x92", protocol=4),
    "STACK_GLOBAL": program(called(split_name("posix", "mkdir")), protocol=4),
    "STACK_GLOBAL past an allowed module": program(
        called(split_name("torch", "serialization.os.mkdir")), protocol=4
    ),
    "STACK_GLOBAL past an allowed function": program(
        called(split_name("torch.serialization", "_get_layout.__globals__.__getitem__"), "os"), b"0", called(),
        protocol=4,
    ),
    "STACK_GLOBAL past an allowed value": program(
        split_name("torch", "float32.__class__") + b"0", called(), protocol=4
    ),
    "a name out of the memo": program(
        text("mkdir") + b"q\x070", called(text("posix") + b"h\x07\x93"), protocol=4
    ),
    "a function out of the memo": program(MKDIR + b"q\x630N0", called(b"h\x63")),
    "a memo written twice": program(named("torch", "Size") + b"q\x010" + MKDIR + b"q\x010", called(b"h\x01")),
    "before the index": program(called(), b"0", of(index())),
    "in the index": pickle.dumps(index(planner_data=[{"x": (Call(os.mkdir, CANARY),)}])),
    "as a key": program(b"}", called(), b"Ns0", of(index())),
    "in a frame": program(b"\x95" + struct.pack("<Q", len(called()) + 1) + called(), protocol=4),
    "in a frame of no length": program(b"\x95" + bytes(8) + called(), protocol=4),
    "EXT1": program(called(bytes([0x82, EXTENSION]))),
    "EXT2": program(called(b"\x83" + struct.pack("<H", EXTENSION))),
    "EXT4": program(called(b"\x84" + struct.pack("<i", EXTENSION))),
    "on top of two stops": program(b"N0", called()) + b"..",
}  # fmt: skip
"""Pickles that make the canary when plain ``pickle`` reads them."""

CHANGING: dict[str, bytes] = {
    "PERSID": program(f"P{CANARY}\n".encode()),
    "BINPERSID": program(text(CANARY) + b"Q"),
    "behind the end": pickle.dumps(index()) + pickle.dumps(Call(os.mkdir, CANARY)),
    "an attribute of an allowed value": program(
        split_name("torch", "float32.__class__") + b"0", of(index()), protocol=4
    ),
    "the module of an allowed function": program(
        split_name("torch.serialization", "_get_layout.__globals__") + text(CANARY) + b"Ns0", of(index()), protocol=4
    ),
    "BUILD of a class": program(
        named("pathlib", "PosixPath") + b"N}" + text("is_symlink") + named("torch", "Size") + b"s\x86b0", of(index())
    ),
    "BUILD of a class of the index": program(
        named(METADATA, "StorageMeta") + b"N}" + text("load_id") + named("torch", "Size") + b"s\x86b0", of(index())
    ),
    "BUILD of a function": program(
        named("torch.serialization", "_get_layout") + b"}" + text("cache") + of({"x": 1}) + b"sb0", of(index())
    ),
    "BUILD of a constant": program(
        named(METADATA, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R}" + text("_value_") + b"K\x05sb0", of(index())
    ),
    "an unknown layout": program(called(named("torch.serialization", "_get_layout"), "torch.nowhere")),
    "a class in place of the index": program(named(METADATA, "Metadata")),
    "an index without an inside": program(named(METADATA, "Metadata") + b")\x81"),
    "storage that is no place": pickle.dumps(index(storage_meta=b"x")),
    "places that are no mapping": pickle.dumps(Metadata({}, storage_data=[1])),
    "PUT far away": program(b"Np4_000_000_000\n"),
    "a bytearray of no end": program(b"\x96" + struct.pack("<Q", 2**45) + b"x", protocol=5),
    "what torch trusts": program(named("torch._utils", "_rebuild_tensor_v2"), EMPTY[2:-1]),
    "no stack": program(b"R"),
    "a name of a megabyte": program(named("x" * 2**20, "y")),
    "a name on two lines": program(text("torch\nfloat32") + text("x") + b"\x93", protocol=4),
}  # fmt: skip
"""Pickles that plain ``pickle`` reads with other damage, or not at all."""


def stored(*entries: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """An archive, by default uncompressed; names may come twice."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in entries:
            archive.NameToInfo.pop(name, None)  # or zipfile warns
            archive.writestr(name, content)
    return file.getvalue()


def torch_archive(data: bytes, *more: tuple[str, bytes]) -> bytes:
    """What torch.save writes of objects whose pickle is ``data``."""
    return stored(("a/data.pkl", data), *more, ("a/byteorder", b"little"), ("a/version", b"3\n"))


def two_readings(shown: bytes, meant: bytes) -> bytes:
    """A file in which zipfile finds the archive ``shown``, and torch the archive ``meant``.

    zipfile takes the central directory right before the end; torch the one that the end points to.
    """

    def parts(archive: bytes, by: int) -> tuple[bytes, bytes]:
        size, begin = struct.unpack("<II", archive[-10:-2])
        directory = bytearray(archive[begin : begin + size])
        at = 0
        while at < size:
            (offset,) = struct.unpack_from("<I", directory, at + 42)
            struct.pack_into("<I", directory, at + 42, offset + by)
            at += 46 + sum(struct.unpack_from("<HHH", directory, at + 28))
        return archive[:begin], bytes(directory)

    meant_files, meant_directory = parts(meant, 0)
    shown_files, shown_directory = parts(shown, len(meant_files) - len(meant_directory))
    body = meant_files + shown_files
    assert len(meant_directory) == len(shown_directory)
    count = struct.unpack("<H", meant[-12:-10])[0]
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(meant_directory), len(body), 0)
    return body + meant_directory + shown_directory + b"PK\5\6" + end


def behind(first: bytes, archive: bytes) -> bytes:
    """``first``, then an archive whose places count from the beginning of the file."""
    file = io.BytesIO(first)
    file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as to, zipfile.ZipFile(io.BytesIO(archive)) as source:
        for entry in source.infolist():
            to.writestr(entry.filename, source.read(entry))
    return file.getvalue()


def payload() -> bytes:
    """A dictionary with a call in it, as torch pickles it."""
    return pickle.dumps({"x": Call(os.mkdir, CANARY)}, protocol=2)


def saved(objects: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(objects, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def tarred() -> bytes:
    """The form of torch before 0.1.10."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload())
            archive.addfile(entry, io.BytesIO(payload()))
    return file.getvalue()


def patched(archive: bytes, old: bytes, new: bytes, *, last: bool) -> bytes:
    """One of the two places of a name, in the local header or in the directory, changed."""
    at = archive.rfind(old) if last else archive.find(old)
    return archive[:at] + new + archive[at + len(old) :]


ARCHIVES: dict[str, bytes] = {
    "a payload, then an archive": payload() + saved({}),
    "a payload, then an archive that counts it": behind(payload(), saved({})),
    "other objects, then an archive that counts them": behind(saved({"x": 1}, zipped=False), saved({})),
    "a program, then an archive": behind(b"#!/bin/sh\n", saved({})),
    "an archive, then a payload": saved({}) + payload(),
    "a payload under the same name": torch_archive(EMPTY, ("a/data.pkl", payload())),
    "a payload first under the same name": torch_archive(payload(), ("a/data.pkl", EMPTY)),
    "a payload under the name in capitals": stored(
        ("a/DATA.PKL", payload()), ("a/data.pkl", EMPTY), ("a/byteorder", b"little"), ("a/version", b"3\n")
    ),
    "a payload in the first folder": stored(("b/data.pkl", payload()), ("b/version", b"3\n"), ("a/data.pkl", EMPTY)),
    "a payload above what looks like the objects": stored(
        ("b/version", b"3\n"), ("b/DATA.pkl", payload()), ("b/x/data.pkl", EMPTY)
    ),
    "two central directories": two_readings(
        stored(("a/pad", bytes(9)), ("a/data.pkl", EMPTY), ("a/version", b"3\n")),
        stored(("a/pad", bytes(9)), ("a/data.pkl", payload()), ("a/version", b"3\n")),
    ),
    "nothing, at length": stored(
        ("a/data.pkl", program(b"N" * 2**21, b"}")), ("a/byteorder", b"little"), ("a/version", b"3\n"),
        how=zipfile.ZIP_DEFLATED,
    ),
    "an archive in an archive": torch_archive(torch_archive(payload())),
    "another name in the local header": patched(torch_archive(payload()), b"a/data.pkl", b"a/tata.pkl", last=False),
    "another name in the directory": patched(torch_archive(payload()), b"a/data.pkl", b"a/tata.pkl", last=True),
    "a size that lies": patched(
        torch_archive(payload()), struct.pack("<II", *[len(payload())] * 2), struct.pack("<II", 5, 2**31), last=True
    ),
    "TorchScript": torch_archive(EMPTY, ("a/constants.pkl", payload()), ("a/code/x.py", b"")),
    "an unknown order of bytes": stored(("a/data.pkl", EMPTY), ("a/byteorder", b"x"), ("a/version", b"3\n")),
    "torch's old form": saved({"x": Call(os.mkdir, CANARY)}, zipped=False),
    "torch's oldest form": tarred(),
    "a tensor": saved({"x": torch.ones(2)}),
    "a number": saved({"x": 1}),
    "a list": saved([]),
    "nothing of torch's": stored(("x", b"")),
}  # fmt: skip
"""Files in the place of an archive of torch's. None of them holds a tensor alone, or nothing."""

RUN_BY_TORCH = (
    "a payload, then an archive",
    "a payload, then an archive that counts it",
    "a payload first under the same name",
    "a payload under the name in capitals",
    "a payload above what looks like the objects",
    "two central directories",
    "another name in the local header",
    "torch's old form",
)
"""The ones in which torch finds the payload; it takes the others for empty, or cannot read them."""


def numbers_twice(first: float, second: float, size: int, dtype: torch.dtype) -> bytes:
    """A tensor of ``size`` numbers: zipfile finds ``first`` in it, torch ``second``."""
    found = []
    for value in (first, second):
        with zipfile.ZipFile(io.BytesIO(saved(torch.full((size,), value, dtype=dtype)))) as archive:
            found.append(stored(*((entry.filename, archive.read(entry)) for entry in archive.infolist())))
    return two_readings(*found)


def safetensors(header: str, data: bytes = b"") -> bytes:
    """A file of safetensors with this header."""
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


_DIGITS = b"1" * 5000
_ONE = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'

WEIGHTS: dict[str, bytes] = {
    "a pickle of protocol 0": RUNNING["protocol 0"],
    "safetensors, then an archive": behind(safetensors(f"{{{_ONE}}}", bytes(4)), torch_archive(payload())),
    "an archive of torch": torch_archive(payload()),
    "remarks that are no text": safetensors(f'{{"__metadata__": {{"x": {{}}}}, {_ONE}}}', bytes(4)),
    "a header shorter than said": safetensors(f"{{{_ONE}}} ", bytes(4)).replace(b"} ", b"}"),
    "a gap between tensors": safetensors(f"{{{_ONE}, {_ONE.replace('a', 'b', 1).replace('0, 4', '8, 12')}}}", bytes(9)),
    "an offset below zero": safetensors(f"{{{_ONE.replace('0, 4', '-4, 0')}}}", bytes(4)),
    "an offset of 5000 digits": safetensors(f"{{{_ONE.replace('4]', '4' * 5000 + ']')}}}"),
}  # fmt: skip
"""Files in the place of ``model.safetensors``."""

CONFIGS: dict[str, bytes] = {
    "a pickle": RUNNING["protocol 2"],
    "a number of 5000 digits": b'{"model_type": ' + _DIGITS + b"}",
    "a deep list": b"[" * 100_000,
    "code of its own": b'{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}',
    "no text": b"\xff\xfe",
}
"""Files in the place of a model's ``config.json``."""

STATES: dict[str, bytes] = {
    "a pickle": RUNNING["protocol 2"],
    "a number of 5000 digits": b'{"format": ' + _DIGITS + b"}",
    "a format on two lines": b'{"format": "2\\n", "state": {}}',
    "no versions": b'{"format": 2, "engines": {}, "models": {}, "state": {}}',
    "versions that are no text": (
        b'{"format": 2, "megatron_core": [], "torch": 1, "engines": {}, "models": {}, "state": {}}'
    ),
}
"""Files in the place of ``state.json``."""

BACKENDS: dict[str, bytes] = {
    "a pickle": RUNNING["protocol 2"],
    "another version": b'{"sharded_backend": "torch_dist", "sharded_backend_version": 2}',
    "another reader of objects": b'{"sharded_backend": "torch_dist", "common_backend": "evil"}',
    "a setting that nobody knows": b'{"sharded_backend": "torch_dist", "import": "evil"}',
}
"""Files in the place of ``metadata.json``."""

TOKENIZERS: dict[str, tuple[str, bytes]] = {
    "a pickle as the tokenizer": ("tokenizer.json", RUNNING["protocol 4"]),
    "a tokenizer cut off": ("tokenizer.json", b"{"),
    "settings cut off": ("tokenizer_config.json", b"["),
    "a deep preprocessor": ("preprocessor_config.json", b"[" * 100_000),
    "a pickle as the preprocessor": ("preprocessor_config.json", RUNNING["protocol 2"]),
    "a template that looks for classes": ("chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a template that looks for modules": (
        "chat_template.jinja",
        b"{{ cycler.__init__.__globals__.os.mkdir('" + CANARY.encode() + b"') }}",
    ),
    "a template cut off": ("chat_template.jinja", b"{% for"),
}
"""Files beside a model's weights, by name."""

FLAGS: dict[str, bytes] = {
    "a call": f"!!python/object/apply:os.mkdir [{CANARY}]".encode(),
    "a deep list": b"[" * 1_500,
    "a day that is none": b"seed: 2001-99-99",
    "no text": b"\xff\xfe",
}
"""Files in the place of the YAML of ``--config``."""
