"""A file of ids: what it says is held against the records, and a record that it leaves out is not trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.loader import RecordSource
from prism_megatron.data.records import Record
from prism_megatron.data.render import Renderer
from prism_megatron.data.selection import digest_of, read_selection
from prism_megatron.errors import DataError
from tests.integration.test_align_records import write_records


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.from_folder(MINI_FOLDER / "policy", system_prompt=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selection") / "set"
    write_records(folder, 20)
    return folder


def source(
    folder: Path, renderer: Renderer, selection: Path | None = None, *, answers_alone: bool = True
) -> RecordSource:
    return RecordSource(
        folder, renderer, part="train", seed=0, batch_size=4, max_prompt_tokens=200, max_response_tokens=200,
        answers_alone=answers_alone, selection=None if selection is None else read_selection(selection),
    )  # fmt: skip


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize("answers_alone", [True, False])
def test_selected_records_alone_are_trained_on(
    folder: Path, renderer: Renderer, tmp_path: Path, answers_alone: bool
) -> None:
    """Claim: in the steps as in those that teach the format; the others are counted, and the order is the set's own."""
    everything = source(folder, renderer).records
    chosen = [everything[5], everything[2], everything[9]]
    path = written(tmp_path / "some.jsonl", *({"id": one.id, "digest": digest_of(one)} for one in chosen))
    some = source(folder, renderer, path, answers_alone=answers_alone)
    assert [record.id for record in some.records] == [everything[i].id for i in (2, 5, 9)]
    assert {some.example(position).prompt.id for position in range(6)} == {one.id for one in chosen}
    assert [some.in_order(i).prompt.id for i in range(3)] == [record.id for record in some.records]
    assert some.counts.to_plain()["not_selected"] == len(everything) - 3
    assert some.identity["digest"] != source(folder, renderer, answers_alone=answers_alone).identity["digest"]


def test_a_line_needs_an_id_alone(folder: Path, renderer: Renderer, tmp_path: Path) -> None:
    one = source(folder, renderer).records[0].id
    assert [record.id for record in source(folder, renderer, written(tmp_path / "x", {"id": one}, "")).records] == [one]


def test_what_is_not_of_the_set_is_refused(folder: Path, renderer: Renderer, tmp_path: Path) -> None:
    """Claim: one complaint, which names file and line: for unknown and held-out ids, and for other texts."""
    records = source(folder, renderer).records
    known = {"id": records[0].id, "digest": digest_of(records[0])}
    (held_out, *_) = {f"made-{i}" for i in range(20)} - {record.id for record in records}
    for line, words in (
        ({"id": "nobody"}, "id: 'nobody' is none of the training part of "),
        ({"id": held_out}, f"id: '{held_out}' is none of the training part of "),
        ({"id": records[1].id, "digest": digest_of(records[2])}, "digest: .* another question or answer than when"),
    ):
        path = written(tmp_path / "other.jsonl", known, line)
        with pytest.raises(DataError, match=f"other.jsonl:2: field {words}"):
            source(folder, renderer, path)


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    for lines, words in (
        (("",), "x:1: no prompt is selected"),
        (({"id": "a"}, {"id": "b"}, {"id": "a"}), "x:3: field id: 'a' was used before, in line 1"),
        (({"id": "a"}, {"pass_rate": 0.5}), "x:2: field id: missing"),
        (({"id": "a", "weight": 2},), "x:1: field weight: unknown"),
        (({"id": 3},), "x:1: field id: text expected"),
        (("[]",), "x:1: not a JSON object"),
    ):
        with pytest.raises(DataError, match=words):
            read_selection(written(tmp_path / "x", *lines))


def test_the_digest_tells_questions_choices_and_answers_apart() -> None:
    record = Record("a", Path("x"), "How many?", None, "3", None, None, "made", "integer")
    others = [
        replace(record, question="How few?"),
        replace(record, answer="4"),
        replace(record, choices=("3", "4")),
        replace(record, answer_type="float"),
    ]
    assert len({digest_of(one) for one in (record, *others)}) == 5
    assert digest_of(replace(record, id="b", caption="c", where="y:1")) == digest_of(record)
