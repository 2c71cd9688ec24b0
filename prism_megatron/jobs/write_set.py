"""``prism-data convert`` and ``shard``: a set is read record by record and written anew, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from prism_megatron.config.formats import FormatConfig
from prism_megatron.config.tools.data_tool import ConvertSetConfig, OnBad, ShardSetConfig
from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.detect import open_corpus
from prism_megatron.data.formats.files.walk import walk
from prism_megatron.data.formats.repeats import id_hash
from prism_megatron.data.formats.write.energon import EnergonWriter
from prism_megatron.data.formats.write.new_folder import new_folder
from prism_megatron.data.formats.write.ours import OursWriter
from prism_megatron.data.formats.write.shards import ShardWriter
from prism_megatron.data.records import in_part
from prism_megatron.errors import ConfigError, DataError

Say = Callable[[str], None]


class _Counts:
    """Of one run, as it goes on."""

    def __init__(self, on_bad: OnBad, say: Say) -> None:
        self._on_bad = on_bad
        self._say = say
        self.written = self.bad = 0

    def take(self, error: DataError) -> None:
        """Raises the error, or says it and counts it."""
        if self._on_bad == "fail":
            raise DataError(f"{error}; nothing was written (--on-bad skip leaves bad records out)") from error
        self.bad += 1
        self._say(f"bad {error}")


def convert_set(config: ConvertSetConfig, *, say: Say) -> None:
    """Write ``config.target``. Raises PrismError, and leaves nothing, for a bad record that may not be left out."""
    if config.to == "energon":
        shard_set(
            ShardSetConfig(
                source=config.source,
                target=config.target,
                reading=config.reading,
                records_per_shard=config.records_per_shard,
                on_bad=config.on_bad,
            ),
            say=say,
        )
        return
    counts = _Counts(config.on_bad, say)
    records = _records(config.source, config.target, config.reading, counts)
    with new_folder(Path(config.target)) as folder:
        writer: OursWriter | ShardWriter
        if config.to == "ours":
            writer = OursWriter(folder, drop_system=config.drop_system)
        else:
            writer = ShardWriter(folder, name="", records_per_shard=config.records_per_shard)
        try:
            for where, conversation in records:
                try:
                    writer.add(conversation, where=where)
                except DataError as error:
                    counts.take(error)
                else:
                    counts.written += 1
        finally:
            writer.close()
        _check_some(counts, config.source)
    say(f"{config.target}: {counts.written:,} records written as {config.to}, {counts.bad:,} bad ones left out")


def shard_set(config: ShardSetConfig, *, say: Say) -> None:
    """Write ``config.target`` as shards with Energon's metadata. Raises PrismError as ``convert_set``."""
    counts = _Counts(config.on_bad, say)
    records = _records(config.source, config.target, config.reading, counts)
    with new_folder(Path(config.target)) as folder:
        names = {"train": ""} if config.validation_share == 0 else {"train": "train_", "val": "val_"}
        writers = {
            part: ShardWriter(folder, name=name, records_per_shard=config.records_per_shard)
            for part, name in names.items()
        }
        index = EnergonWriter(folder)
        try:
            for where, conversation in records:
                held_out = in_part(conversation, "validation", validation_share=config.validation_share)
                part = "val" if held_out else "train"
                try:
                    shard, sample = writers[part].add(conversation, where=where)
                except DataError as error:
                    counts.take(error)
                else:
                    counts.written += 1
                    index.add(shard, sample, part=part)
            _check_some(counts, config.source)
            index.close({part: writer.counts for part, writer in writers.items()})
        except BaseException:
            index.abandon()
            raise
        finally:
            for writer in writers.values():
                writer.close()
    shards = sum(len(writer.counts) for writer in writers.values())
    say(f"{config.target}: {counts.written:,} records in {shards:,} shards, {counts.bad:,} bad ones left out")


def _records(source: str, target: str, reading: FormatConfig, counts: _Counts) -> Iterator[tuple[str, Conversation]]:
    """Good records with ids of their own. Sets that are for evaluation only keep what marks them: they are refused."""
    if not source or not target:
        raise ConfigError("name a set to read, and the folder to write")
    return _good(source, reading, counts)


def _good(source: str, reading: FormatConfig, counts: _Counts) -> Iterator[tuple[str, Conversation]]:
    used: set[int] = set()
    for where, found in walk(open_corpus(Path(source), reading, purpose="train")):
        if isinstance(found, DataError):
            counts.take(found)
            continue
        key = id_hash(found.id)
        if key in used:
            counts.take(DataError(f"{where}: field id: {found.id!r} was used before"))
            continue
        used.add(key)
        yield where, found


def _check_some(counts: _Counts, source: str) -> None:
    if not counts.written:
        raise DataError(f"{source}: no record can be written, so nothing was")
