"""Which format a set is in, and the corpus that reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prism_megatron.config.formats import FORMAT_NAMES, FormatConfig, FormatName
from prism_megatron.data.formats import columns, prism, sharegpt, verl
from prism_megatron.data.formats.energon import META
from prism_megatron.data.formats.files.base import Corpus
from prism_megatron.data.formats.files.reading import Reading, names_of
from prism_megatron.data.formats.ours import FILE, OursCorpus
from prism_megatron.data.formats.rows import RowCorpus, RowParser, row_files, scan_of
from prism_megatron.data.formats.webdataset import ShardCorpus
from prism_megatron.data.records import Purpose, refuse_evaluation_folder
from prism_megatron.errors import DataError

PARSERS: dict[FormatName, RowParser] = {
    "sharegpt": sharegpt.parse,
    "columns": columns.parse,
    "verl": verl.parse,
    "prism": prism.parse,
}


def open_corpus(path: Path, config: FormatConfig, *, purpose: Purpose) -> Corpus:
    """The set at ``path``; its records are not read yet.

    Raises DataError for a format that cannot be told, and for training on a set that is for evaluation only.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; name a file or a folder of records")
    folder = folder_of(path)
    if purpose == "train":
        refuse_evaluation_set(path)
    names_of(config.columns, columns.FIELDS)
    images = folder if config.images is None else config.images.resolve()
    stem = path.resolve().name if path.is_dir() else path.name.partition(".")[0]
    reading = Reading(config, purpose, images, stem or "set")
    name = config.format or format_of(path, split=config.split)
    if name == "ours":
        return OursCorpus(path, reading)
    if name in ("webdataset", "energon"):
        return ShardCorpus(name, path, reading)
    return RowCorpus(name, path, reading, PARSERS[name])


def folder_of(path: Path) -> Path:
    """The folder that a set lies in, without links."""
    return (path if path.is_dir() else path.parent).resolve()


def refuse_evaluation_set(path: Path) -> None:
    """Raise DataError for a set that is for evaluation only, or a file or a folder of shards inside one."""
    folder = folder_of(path)
    for one in (folder, folder.parent):
        refuse_evaluation_folder(one)


def format_of(path: Path, *, split: str = "train") -> FormatName:
    """Told by what is there, and by the fields of the first record. Raises DataError, listing formats and the flag."""
    if path.is_dir():
        kinds = _folder_kinds(path)
        if len(kinds) > 1:
            raise DataError(f"{path} may be {' or '.join(kinds)}; {_ADVICE}")
        if kinds:
            return kinds[0]
        if (path / "state.json").is_file() and any(path.glob("*.arrow")):
            raise DataError(f"{path} was written by save_to_disk of Hugging Face datasets; write it by to_parquet")
    elif path.suffix == ".tar":
        return "webdataset"
    fields = _first_fields(path, split)
    kinds = [name for name, holds in _MARKS.items() if holds(fields)]
    if len(kinds) == 1:
        return kinds[0]
    found = ", ".join(sorted(fields)[:12]) or "none"
    raise DataError(
        f"{path}: {'several formats' if kinds else 'no format'} "
        f"({', '.join(kinds) or 'of those known'}) fit a record with the fields {found}; {_ADVICE}"
    )


_ADVICE = f"say which by --format {{{','.join(FORMAT_NAMES)}}} (docs/data.md shows each)"


def _folder_kinds(path: Path) -> list[FormatName]:
    kinds: list[FormatName] = []
    if (path / META).is_dir():
        kinds.append("energon")
    elif any(path.rglob("*.tar")):
        kinds.append("webdataset")
    if (path / FILE).is_file() and _is_ours(_first_fields(path / FILE, "")):
        kinds.append("ours")
    return kinds


def _is_ours(fields: frozenset[str]) -> bool:
    return {"image", "question", "answer_type"} <= fields


def _has(field: str) -> Callable[[frozenset[str]], bool]:
    return lambda fields: bool(fields & set(columns.NAMES[field]))


def _is_verl(fields: frozenset[str]) -> bool:
    return "reward_model" in fields and not _is_prism(fields)


def _is_prism(fields: frozenset[str]) -> bool:
    return bool(fields & set(prism.MARKS))


def _is_columns(fields: frozenset[str]) -> bool:
    others = _is_ours(fields) or _is_verl(fields) or _is_prism(fields) or _has("messages")(fields)
    texts = any(_has(name)(fields) for name in ("answer", "response", "solution"))
    return _has("question")(fields) and texts and not others


_MARKS: dict[FormatName, Callable[[frozenset[str]], bool]] = {
    "ours": _is_ours,
    "prism": _is_prism,
    "verl": _is_verl,
    "sharegpt": _has("messages"),
    "columns": _is_columns,
}


def _first_fields(path: Path, split: str) -> frozenset[str]:
    """Names of the first record's fields; none where it is no object. Raises DataError where there is no record."""
    reading = Reading(FormatConfig(split=split), "evaluate", path, "set")
    corpus = RowCorpus("columns", path, reading, columns.parse)
    shard = row_files(path, split=split)[0]
    for place in scan_of(shard)(shard):
        try:
            return frozenset(map(str, corpus.row(shard, place)))
        except DataError:
            continue  # a bad record is for those who read it; the next one may tell
    raise DataError(f"{path}: no record in {shard.name} tells the format; {_ADVICE}")
