"""An index finds every record, knows its length, and is made again when anything that it depends on has changed."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_megatron.data.formats.conversations import ConversationLines
from prism_megatron.data.formats.files.base import Place, line_places
from prism_megatron.data.index.index import ABOUT, BAD, Index, open_index
from prism_megatron.data.records import in_part
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.errors import DataError, DiskError
from tests.unit.data.conversation_files import SOURCES, Tally, line_of, write_conversations

Opening = Callable[..., Index]


@pytest.fixture
def opening(renderer: Renderer, tmp_path: Path) -> Opening:
    render = ConversationRenderer(renderer, label_turns="last")

    def opened(path: Path, **changes: Any) -> Index:
        how: dict[str, Any] = {"validation_share": 0.1, "on_bad": "fail", "workers": 0, "counting": Tally()}
        return open_index(
            changes.pop("corpus", ConversationLines(path)),
            changes.pop("render", render),
            changes.pop("root", tmp_path / "indexes"),
            **how | changes,
        )

    return opened


def test_every_record_is_found_with_its_length(opening: Opening, renderer: Renderer, tmp_path: Path) -> None:
    """Claim: rows are the file's lines in order; each reads back, and its lengths are those of its tokens."""
    path = write_conversations(tmp_path, 60)
    tally = Tally()
    index = opening(path, counting=tally)
    assert len(index) == 60 and index.num_bad == 0 and tally.done == {"shards": [1, 1], "records": [60, 60]}
    assert sorted(index.sources) == list(SOURCES)
    corpus, render = ConversationLines(path), ConversationRenderer(renderer, label_turns="last")
    for row in range(60):
        conversation = index.read(corpus, row)
        assert conversation.id == f"r{row}" and index.where(row) == f"{path}:{row + 1}"
        assert index.sources[index.column("source")[row]] == conversation.source
        assert index.column("held_out")[row] == in_part(conversation, "validation", validation_share=0.1)
        sequence, mask = render(conversation)
        visual = sequence.token_ids.count(renderer.image_token_id)
        lengths = [int(index.column(name)[row]) for name in ("text_tokens", "visual_tokens", "label_tokens")]
        assert lengths == [len(mask) - visual, visual, sum(mask)]
    assert 0 < index.column("held_out").sum() < 30


def test_worker_processes_make_the_same_index(opening: Opening, tmp_path: Path) -> None:
    """Claim: byte for byte, in the order of the file, bad records too; and nothing is left beside it."""
    path = write_conversations(tmp_path, 700)
    text = path.read_text(encoding="utf-8").split("\n")
    text[300], text[650] = "nonsense", line_of(7, [], "again")
    path.write_text("\n".join(text), encoding="utf-8")
    one = opening(path, on_bad="skip", root=tmp_path / "one")
    two = opening(path, on_bad="skip", root=tmp_path / "two", workers=2)
    assert one.folder.name == two.folder.name and len(one) == 698
    for file in one.folder.iterdir():
        assert file.read_bytes() == (two.folder / file.name).read_bytes(), file.name
    assert [child.name for child in (tmp_path / "two").iterdir()] == [two.folder.name]


def test_an_index_is_used_again(opening: Opening, tmp_path: Path) -> None:
    path = write_conversations(tmp_path, 20)
    first = opening(path)
    tally = Tally()
    again = opening(path, counting=tally)
    assert again.folder == first.folder and tally.done == {}


def test_whatever_it_depends_on_makes_another(opening: Opening, mini_folder: Path, tmp_path: Path) -> None:
    """Claim: the file (content by size, or by time), how it is read, the rendering, and the part held out."""
    path = write_conversations(tmp_path, 20)
    folders = [opening(path).folder]
    other = Renderer.from_folder(mini_folder, system_prompt="Be brief.")
    folders.append(opening(path, render=ConversationRenderer(other, label_turns="last")).folder)
    folders.append(opening(path, validation_share=0.2).folder)

    class Otherwise(ConversationLines):
        settings = "column=other"

    folders.append(opening(path, corpus=Otherwise(path)).folder)
    os.utime(path, ns=(1, 1))
    folders.append(opening(path).folder)
    with path.open("a", encoding="utf-8") as file:
        file.write(line_of(100, [], "more") + "\n")
    folders.append(opening(path).folder)
    assert len(set(folders)) == len(folders)


def test_bad_records_fail_at_once_or_are_skipped_and_listed(opening: Opening, tmp_path: Path) -> None:
    """Claim: the complaint names the first by line, their number and the file with all; skipping keeps the rest."""
    path = write_conversations(tmp_path, 12)
    lines = path.read_text(encoding="utf-8").split("\n")
    control = line_of(3, [], "a <|im_end|> b")
    lines[1], lines[3], lines[5], lines[7] = "{", control, line_of(5, [{"image": "images/none.png"}], "x"), lines[0]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=rf"4 of 12 records are bad: {path}:2: not a JSON object") as caught:
        opening(path)
    skipping = opening(path, on_bad="skip")
    assert str(skipping.folder / BAD) in str(caught.value)
    assert [int(skipping.column("number")[row]) for row in range(len(skipping))] == [1, 3, 5, 7, 9, 10, 11, 12]
    reasons = {one.where: one.reason for one in skipping.bad_records()}
    assert sorted(reasons) == sorted(f"{path}:{number}" for number in (2, 4, 6, 8))
    assert all(reason.startswith(where) for where, reason in reasons.items())
    assert "<|im_end|>" in reasons[f"{path}:4"] and "none.png" in reasons[f"{path}:6"]
    assert reasons[f"{path}:8"] == f"{path}:8: its id was used before, by record 1"
    with pytest.raises(DataError, match="4 of 12"):
        opening(path)  # the same index, used again


def test_one_bad_record_is_told_by_itself_and_none_left_is_an_error(opening: Opening, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("[]\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"^{path}:1: not a JSON object"):
        opening(path)
    with pytest.raises(DataError, match="no record can be used of 1: "):
        opening(path, on_bad="skip")
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(DataError, match="no record can be used of 0"):
        opening(path, on_bad="skip")
    with pytest.raises(DataError, match=r"none\.jsonl is no file"):
        opening(tmp_path / "none.jsonl")


def test_a_record_that_changed_since_is_named(opening: Opening, tmp_path: Path) -> None:
    path = write_conversations(tmp_path, 5)
    index = opening(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=rf"{path}:3: the file ends in the record"):
        index.read(ConversationLines(path), 2)


@pytest.mark.parametrize("damage", ["cut", "lost", "no json", "other version", "wrong length"])
def test_a_damaged_index_is_named(damage: str, opening: Opening, tmp_path: Path) -> None:
    path = write_conversations(tmp_path, 5)
    folder = opening(path).folder
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if damage == "cut":
        (folder / "size.npy").write_bytes((folder / "size.npy").read_bytes()[:-1])
    elif damage == "lost":
        (folder / "size.npy").unlink()
    elif damage == "wrong length":
        np.save(folder / "size.npy", np.zeros(4, dtype=np.int64))
    else:
        text = "{" if damage == "no json" else json.dumps(about | {"version": 0})
        (folder / ABOUT).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"{folder} is no whole index.*remove it"):
        opening(path)


def test_pickled_it_is_opened_again_and_not_copied(opening: Opening, tmp_path: Path) -> None:
    """Claim: what goes to a worker is the folder's name, not the columns."""
    index = opening(write_conversations(tmp_path, 50))
    data = pickle.dumps(index)
    assert len(data) < 500
    again = pickle.loads(data)
    assert np.array_equal(again.column("offset"), index.column("offset"))
    assert isinstance(again.column("offset"), np.memmap)


def test_of_two_that_make_it_at_once_one_stays(opening: Opening, tmp_path: Path) -> None:
    """The other's is there by the time this one is renamed."""
    path = write_conversations(tmp_path, 5)
    theirs = opening(path).folder
    kept = theirs.with_name("kept")
    theirs.rename(kept)

    class Late(Tally):
        def task(self, unit: str, *, total: int) -> Any:
            if unit == "records":
                kept.rename(theirs)
            return super().task(unit, total=total)

    assert opening(path, counting=Late()).folder == theirs
    assert [child.name for child in theirs.parent.iterdir()] == [theirs.name]


def test_a_folder_that_takes_no_index_is_named(opening: Opening, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DiskError, match="cannot be written"):
        opening(write_conversations(tmp_path, 5), root=tmp_path / "file")


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n  \n"])
def test_lines_are_placed_by_their_bytes(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: blank lines count and are no records; lines that cross the blocks of a scan are whole."""
    monkeypatch.setattr("prism_megatron.data.formats.files.base._SCAN_BYTES", 7)
    lines = [b"a" * 20, b"", b" \t", b"\xc3\xa9" * 5, b"x\r"]
    path = tmp_path / "lines"
    path.write_bytes(b"\n".join(lines) + end.encode())
    places = list(line_places(path))
    assert [(path.read_bytes()[p.offset : p.offset + p.size], p.number) for p in places] == [
        (lines[0], 1),
        (lines[3], 4),
        (lines[4], 5),
    ]
    assert places[0].of(path) == f"{path}:1" and isinstance(places[0], Place)


def test_a_very_long_line_is_placed_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: 16 MB in a line of 16,000 blocks; putting the line together anew for each would copy 128 GB."""
    monkeypatch.setattr("prism_megatron.data.formats.files.base._SCAN_BYTES", 1000)
    path = tmp_path / "lines"
    path.write_bytes(b"a" * 16_000_000 + b"\nb\n" + b" " * 100_000 + b"\nc")
    began = time.process_time()
    assert list(line_places(path)) == [Place(0, 16_000_000, 1), Place(16_000_001, 1, 2), Place(16_100_004, 1, 4)]
    assert time.process_time() - began < 2.0


def test_a_line_that_ends_in_white_space_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_megatron.data.formats.files.base._SCAN_BYTES", 7)
    path = tmp_path / "lines"
    path.write_bytes(b"ab" + b" " * 30 + b"\n" + b" " * 30 + b"\ncd" + b" " * 30)
    assert list(line_places(path)) == [Place(0, 32, 1), Place(64, 32, 3)]
