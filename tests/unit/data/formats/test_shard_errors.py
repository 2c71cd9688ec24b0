"""What is wrong with shards of samples, or with what Energon says about them, is said by shard, sample and field."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.formats.detect import open_corpus
from prism_megatron.data.formats.files.walk import walk
from prism_megatron.errors import DataError, PrismError
from tests.unit.data.formats.sets import (
    ANSWER,
    CHAT,
    USER,
    add,
    png,
    read_set,
    records_of,
    synthetic,
    write_energon,
    write_tars,
)


def test_bad_samples_of_a_shard_are_named(tmp_path: Path) -> None:
    message = json.dumps({"messages": [USER, ANSWER]}).encode()
    image = png(1)
    samples: list[tuple[dict[str, bytes], str]] = [
        ({"json": message, "png": image}, ""),
        ({"png": image}, r"sample b has no b\.json; it has png"),
        ({"json": b"{", "png": image}, "not JSON"),
        ({"json": b"7", "png": image}, "an object with the record's fields expected"),
        ({"json": message}, "more places for images"),
        ({"json": message, "png": b""}, "field images: png is empty"),
        (
            {"json": json.dumps({**CHAT, "images": ["png", "1.png"]}).encode(), "png": image},
            r"field images: 1\.png not in",
        ),
        ({"json": json.dumps([USER, ANSWER]).encode(), "jpg": image}, ""),
    ]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "__about__/x.json", b"{}")
        add(tar, "README", b"no sample")
        for key, (parts, _) in zip("abcdefgh", samples, strict=True):
            for part, data in parts.items():
                add(tar, f"{key}.{part}", data)
        add(tar, "i.json", message)
        add(tar, "i.json", message)
        link = tarfile.TarInfo("j.json")
        link.type, link.linkname = tarfile.SYMTYPE, "a.json"
        tar.addfile(link)
    problems = [*(problem for _, problem in samples), r"i\.json stands twice", r"j\.json is a link or a device"]
    outcomes = [found for _, found in walk(open_corpus(path, FormatConfig(), purpose="train"))]
    for number, (problem, found) in enumerate(zip(problems, outcomes, strict=True), start=1):
        if not problem:
            assert not isinstance(found, DataError) and len(found.pictures) == 1
            continue
        with pytest.raises(DataError, match=rf"x\.tar:{number}: .*{problem}"):
            raise found if isinstance(found, DataError) else AssertionError(number)


def test_a_cut_shard_ends_in_one_error_after_its_whole_samples(tmp_path: Path) -> None:
    ours = synthetic(tmp_path / "ours", count=3)
    (shard,) = sorted((write_tars(records_of(ours), tmp_path / "tars") / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:6000])
    outcomes = list(walk(open_corpus(tmp_path / "tars", FormatConfig(), purpose="train")))
    assert [where for where, _ in outcomes[-1:]] == [str(shard)] and "ends inside" in str(outcomes[-1][1])
    assert outcomes[:-1] and not any(isinstance(found, DataError) for _, found in outcomes[:-1])
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(b"x" * 3000))
    ((_, found),) = walk(open_corpus(packed, FormatConfig(), purpose="train"))
    assert "is it an uncompressed tar?" in str(found) or "ends inside a header" in str(found)


def test_images_of_a_sample_come_in_the_order_that_it_names(tmp_path: Path) -> None:
    two = {"role": "user", "content": "<image><image>Why?"}
    named = {"messages": [two, ANSWER], "images": ["1.png", "0.png"]}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, about in (("a", named), ("b", {"messages": [two, ANSWER], "images": ["elsewhere/7.png"] * 2})):
            add(tar, f"{key}.0.png", png(0))
            add(tar, f"{key}.json", json.dumps(about).encode())
            add(tar, f"{key}.1.png", png(1))
    by_name, by_place = read_set(tmp_path / "x.tar")
    assert [picture.stored for picture in by_name.pictures] == [png(1), png(0)]
    assert [picture.stored for picture in by_place.pictures] == [png(0), png(1)]
    assert [by_name.id, by_place.id, by_place.source] == ["a", "b", "x"]


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("split.yaml", "split_parts: {train: [shards/none.tar]}", r"none\.tar: named by \.nv-meta and not there"),
        ("split.yaml", "split_parts: {train: [../x.tar]}", "shard '../x.tar' is not inside"),
        ("split.yaml", 'split_parts: {train: ["a\\0.tar"]}', r"shard 'a\\x00.tar' is not inside"),
        ("split.yaml", 'split_parts: {train: ["a\\ud800.tar"]}', r"split\.yaml: cannot be read|is not inside"),
        ("split.yaml", "split_parts: {val: []}", "part 'train' of the split is not there; --split val or all"),
        ("split.yaml", "split_parts: {train: []}", "part 'train' of the split has no shards"),
        ("split.yaml", "split_parts: {train: [7]}", "split_parts: a list of names expected"),
        ("split.yaml", "split_parts: {train: ['a{0..99999999}']}", "stands for more than 1000000 names"),
        ("split.yaml", "split_parts: {train: ['a{0..999}{0..999}{0..9}']}", "stands for more than 1000000 names"),
        ("split.yaml", "[1]", r"split\.yaml: keys with values expected"),
        ("split.yaml", "{", r"split\.yaml: cannot be read"),
        (".info.json", "{}", "shard_counts must give a number for every shard"),
        (".info.json", '{"shard_counts": {"a": "b"}}', "shard_counts must give a number for every shard"),
    ],
)
def test_damaged_metadata_of_energon_is_named(file: str, text: str, problem: str, tmp_path: Path) -> None:
    path = write_energon(records_of(synthetic(tmp_path / "ours", count=2)), tmp_path / "theirs")
    (path / ".nv-meta" / file).write_text(text)
    with pytest.raises(PrismError, match=problem):
        read_set(path)


def test_parts_and_exclusions_of_energon_are_kept(tmp_path: Path) -> None:
    path = write_energon(records_of(synthetic(tmp_path / "ours", count=20)), tmp_path / "theirs")
    split = {
        "split_parts": {"train": ["shards/shard_0000{00,08}.tar"], "val": ["shards/shard_{000016..000016}.tar"]},
        "exclude": ["shards/shard_000008.tar", "shards/shard_000000.tar/folder.x/k1"],
    }
    before = open_corpus(path, FormatConfig(), purpose="train").settings
    (path / ".nv-meta" / "split.yaml").write_text(json.dumps(split))
    assert open_corpus(path, FormatConfig(), purpose="train").settings != before
    (path / ".nv-meta" / ".info.json").rename(path / ".nv-meta" / ".info.yaml")  # JSON is YAML
    train = [one.id for one in read_set(path)]
    assert train == [f"own-{i}" for i in (0, 2, 3, 4, 5, 6, 7)]
    assert [one.id for one in read_set(path, split="val")] == [f"own-{i}" for i in range(16, 20)]
    assert [one.id for one in read_set(path, split="all")] == [*train, *(f"own-{i}" for i in range(16, 20))]
