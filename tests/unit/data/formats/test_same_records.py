"""Twenty records, stored in each format, are read to the same conversations as from our own folder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.formats.detect import format_of, open_corpus
from prism_megatron.data.formats.files.base import Corpus
from tests.unit.data.formats.sets import WRITERS, read_set, real, records_of, seen, synthetic

TAGGED = [name for name in WRITERS if name != "verl"]
PLAIN = [name for name in WRITERS if name != "prism"]


@pytest.mark.parametrize("name", TAGGED)
def test_tagged_records(name: str, tmp_path: Path) -> None:
    _compare(name, synthetic(tmp_path / "ours"), tmp_path / "theirs", plain_answers=False)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_answers(name: str, tmp_path: Path) -> None:
    _compare(name, synthetic(tmp_path / "ours", tagged=False), tmp_path / "theirs", plain_answers=True)


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("set_name", ["tabmwp", "puzzlevqa"])
def test_real_tagged_records(set_name: str, name: str, shared_dir: Path, tmp_path: Path) -> None:
    _compare(name, real(shared_dir, tmp_path / "ours", set_name), tmp_path / "theirs", plain_answers=False)


@pytest.mark.parametrize("name", PLAIN)
def test_real_plain_answers(name: str, shared_dir: Path, tmp_path: Path) -> None:
    """NLVR has captions and no solutions."""
    _compare(name, real(shared_dir, tmp_path / "ours", "nlvr"), tmp_path / "theirs", plain_answers=True)


def _compare(name: str, ours: Path, folder: Path, *, plain_answers: bool) -> None:
    assert format_of(ours) == "ours"
    expected = [seen(one) for one in read_set(ours, plain_answers=plain_answers)]
    assert len(expected) == 20 and len({one[0] for one in expected}) == 20
    folder.mkdir()
    path = WRITERS[name](records_of(ours), folder)
    assert format_of(path) == name.partition(" ")[0]
    assert [seen(one) for one in read_set(path, plain_answers=plain_answers)] == expected


@pytest.mark.parametrize("name", ["ours", *WRITERS])
def test_any_record_at_any_time_and_in_another_process(name: str, tmp_path: Path) -> None:
    """Claim: records are read in any order, and by a pickled copy, which is what worker processes get."""
    ours = synthetic(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    path = ours if name == "ours" else WRITERS[name](records_of(ours), tmp_path / "theirs")
    corpus = open_corpus(path, FormatConfig(plain_answers=True), purpose="train")
    assert isinstance(corpus, Corpus)
    places = [(shard, place) for shard in corpus.shards() for place in corpus.scan(shard)]
    assert len(places) == 20
    forwards = [seen(corpus.read(*place)) for place in places]
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy == corpus and copy.settings == corpus.settings
    assert [seen(copy.read(*place)) for place in reversed(places)] == forwards[::-1]
    assert corpus.settings != open_corpus(path, FormatConfig(), purpose="train").settings


def test_ids_stay_where_a_set_has_none(tmp_path: Path) -> None:
    """Claim: a record without an id gets one from what it holds, so its part does not change with the file's order."""
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "No."}]} for i in range(3)
    ]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
    one, other = read_set(tmp_path / "a.jsonl"), read_set(tmp_path / "b.jsonl")
    assert [conversation.id for conversation in one] == [conversation.id for conversation in other[::-1]]
    assert len({conversation.id for conversation in one}) == 3
    assert {conversation.source for conversation in one} == {"a"}
