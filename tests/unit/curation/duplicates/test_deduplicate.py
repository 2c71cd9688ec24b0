"""Which problems of a pool are kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from prism_megatron.config.tools.curate import Duplicates
from prism_megatron.curation.duplicates import candidates, hashes, step
from prism_megatron.curation.duplicates.hashes import hashes_of
from prism_megatron.curation.duplicates.look import sketch_picture
from prism_megatron.curation.duplicates.scratch import Scratch
from prism_megatron.curation.duplicates.step import Verdict, deduplicate
from prism_megatron.data.records import Record
from prism_megatron.errors import ConfigError, DataError
from tests.unit.curation.duplicates.planted import by_id, giving, record, scenes

ASKED = "At the fair, how many of the seven painted balloons that Ada holds are as round as the moon?"


def search(
    pool: Sequence[Record], folder: Path, *, evaluation: Sequence[Record] = (), workers: int = 0
) -> list[Verdict]:
    found = deduplicate(
        giving(pool), giving(evaluation), Duplicates(), workers=workers, folder=folder, say=lambda _: None
    )
    return list(found)


def picture(seed: int, *, size: int = 96) -> Image.Image:
    """A few bright shapes at places of their own."""
    draw_from = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, side = draw_from.integers(8, size - 30, 3) // (1, 1, 3) + (0, 0, 10)
        colour = tuple(int(level) for level in draw_from.integers(0, 255, 3))
        draw.rectangle((int(x), int(y), int(x + side), int(y + side)), fill=colour)
    return image


def test_the_first_of_the_same_problems_is_kept(tmp_path: Path) -> None:
    """Claim: pixels, question and answer are compared, but for case and white space; whoever comes first stays."""
    first = record(tmp_path, "first", picture(1), ASKED, "4")
    again = record(tmp_path, "again", picture(1).convert("RGBA"), f" {ASKED.upper()}\n", "4.0")
    wrong = replace(again, id="wrong", answer="5")
    pool = [first, again, wrong, replace(wrong, id="wrong again")]
    assert search(pool, tmp_path) == [
        Verdict(0), Verdict(1, "the same as", "first"), Verdict(2), Verdict(3, "the same as", "wrong"),
    ]  # fmt: skip
    assert [one.reason for one in search(pool[::-1], tmp_path)] == [None, "the same as", None, "the same as"]


def test_answers_pictures_and_words_make_problems_near(tmp_path: Path) -> None:
    """Claim: equal answers and alike pictures are needed, and a few shared words, or for yes and no the same text."""
    pool = [
        record(tmp_path, "count", picture(1), "How many red squares are there?", "4"),
        record(tmp_path, "smaller", picture(1).resize((70, 70)), "Count red squares and say how many.", "4"),
        record(tmp_path, "other answer", picture(1).resize((71, 71)), "How many red squares are there?", "3"),
        record(tmp_path, "other picture", picture(2), "How many red squares are there?", "4"),
        record(tmp_path, "no word shared", picture(1).resize((72, 72)), "Zähle bitte", "4"),
        record(tmp_path, "yes", picture(3), "Are there more red squares than blue ones in it?", "yes"),
        record(tmp_path, "other yes", picture(3), "Are there more red squares than green ones in it?", "yes"),
        record(tmp_path, "yes again", picture(3).resize((70, 70)), "Are there more red squares than blue ones in it",
               "Yes"),
    ]  # fmt: skip
    found = by_id(pool, search(pool, tmp_path))
    assert {id_: one.other for id_, one in found.items() if not one.kept} == {"smaller": "count", "yes again": "yes"}
    assert {one.reason for one in found.values() if not one.kept} == {"near"}


def test_a_problem_is_held_against_kept_ones_alone(tmp_path: Path) -> None:
    """Claim: of three problems of which neighbours are near, the first and the last stay, in one block or in three."""
    words = [f"w{i}" for i in range(20)]
    texts = [" ".join(words[i : i + 16]) for i in range(3)]
    pool = [record(tmp_path, f"p{i}", picture(1), text, "yes") for i, text in enumerate(texts)]
    wanted = [Verdict(0), Verdict(1, "near", "p0"), Verdict(2)]
    assert search(pool, tmp_path) == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "ROWS", 1)
        assert search(pool, tmp_path) == wanted
    assert search([pool[1], pool[0], pool[2]], tmp_path)[0].kept


def test_blocks_tiles_and_processes_change_nothing(tmp_path: Path) -> None:
    """Claim: verdicts depend on the records and their order alone; who is in question does not depend on the order.

    Each of 40 problems comes three times, in an order of its own each time: one of each stays.
    """
    drawn = [one for one in scenes(tmp_path, 60) if one.answer not in ("yes", "no")][:40]
    order = np.random.default_rng(4).permutation(120)
    copies = [
        replace(one, id=f"{one.id}-{i}", question=f"{one.question}{' now' * i}") for one in drawn for i in range(3)
    ]
    pool = [copies[i] for i in order]
    wanted = search(pool, tmp_path, evaluation=drawn[:5])
    assert sum(one.kept for one in wanted) == 35
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "ROWS", 7)
        patch.setattr(candidates, "ROWS", 3)
        patch.setattr(candidates, "COLUMNS", 11)
        assert search(pool, tmp_path, evaluation=drawn[:5]) == wanted
    assert search(pool, tmp_path, evaluation=drawn[:5], workers=2) == wanted
    other_way = by_id(pool[::-1], search(pool[::-1], tmp_path))
    assert {id_.rpartition("-")[0] for id_, one in other_way.items() if one.kept} == {one.id for one in drawn}


def test_a_problem_of_an_evaluation_is_refused(tmp_path: Path) -> None:
    """Claim: by its picture whatever is asked of it, and by its question where that is long enough, also for a crop."""
    evaluation = [
        record(tmp_path, "e1", picture(1), "How many squares?", "4", source="exam"),
        record(tmp_path, "e2", picture(2), ASKED, "2", source="exam"),
    ]
    pool = [
        record(tmp_path, "asked otherwise", picture(1).resize((60, 60)), "Are there circles in the picture?", "no"),
        record(tmp_path, "cropped", picture(2).crop((20, 20, 90, 90)), ASKED.upper(), "3"),
        record(tmp_path, "short question", picture(5), "How many squares?", "4"),
        record(tmp_path, "another", picture(6), ASKED.replace("balloons that Ada holds", "eggs of a hen"), "2"),
    ]
    assert search(pool, tmp_path, evaluation=evaluation) == [
        Verdict(0, "near evaluation record", "exam/e1"),
        Verdict(1, "near evaluation record", "exam/e2"),
        Verdict(2),
        Verdict(3),
    ]


def test_nothing_comes_of_nothing(tmp_path: Path) -> None:
    assert search([], tmp_path) == []
    assert search([], tmp_path, evaluation=scenes(tmp_path, 2)) == []


def test_a_file_is_looked_at_once_and_a_record_takes_few_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Claim: pictures of one content are decoded once; a record takes at most 140 bytes however long its text is."""
    seen: list[Path] = []

    def counted(path: Path) -> object:
        seen.append(path)
        return sketch_picture(path)

    monkeypatch.setattr(hashes, "sketch_picture", counted)
    one, other, *more = scenes(tmp_path, 8)
    copy = tmp_path / "copy.png"
    copy.write_bytes(one.image.read_bytes())
    pool = [one, replace(one, id="b", image=copy), other, replace(one, id="c", question="long " * 10_000), other, *more]
    with Scratch.inside(tmp_path) as scratch:
        found = hashes_of(giving([one]), giving(pool), scratch, overlap=0.8, workers=0)
    assert seen == [one.image, other.image, *(each.image for each in more)]
    assert found.picture_N.tolist() == [0, 0, 0, 1, 0, 1, *range(2, 8)] and len(found) == 12
    taken = sum(values.nbytes for values in vars(found).values() if isinstance(values, np.ndarray))
    assert taken <= 140 * len(found)


def test_what_it_kept_on_the_disk_is_gone(tmp_path: Path) -> None:
    """Claim: the hidden folder is removed at the end, also of a search that is given up, and one that is left over."""
    pool, folder = scenes(tmp_path, 3), tmp_path / "own"
    (folder / ".duplicates").mkdir(parents=True)
    (folder / ".duplicates" / "looks").write_bytes(b"of a killed process")
    assert all(one.kept for one in search(pool, folder))
    begun = deduplicate(giving(pool), giving([]), Duplicates(), workers=0, folder=folder, say=lambda _: None)
    next(begun)
    assert [one.name for one in folder.iterdir()] == [".duplicates"]
    begun.close()  # type: ignore[attr-defined]  # it is a generator
    assert list(folder.iterdir()) == []


def test_a_problem_whose_picture_cannot_be_read_falls_alone(tmp_path: Path) -> None:
    """Claim: it is like no other, not even like another one of that kind with its question; an evaluation's is an
    error, and so is a file that is not there."""
    pool = scenes(tmp_path, 3)
    pool[1].image.write_bytes(b"\x89PNG\r\n\x1a\nnot")
    again = replace(pool[1], id="again", image=tmp_path / "again.png")
    again.image.write_bytes(b"\x89PNG\r\n\x1a\nnor this")
    for workers in (0, 1):
        found = search([*pool, again], tmp_path, workers=workers)
        assert [one.reason for one in found] == [
            None, "an image that cannot be read", None, "an image that cannot be read",
        ]  # fmt: skip
        assert [one.other for one in found] == [""] * 4
    with pytest.raises(DataError, match=f"^{pool[1].where}: field image: .*cannot be read"):
        search([pool[0]], tmp_path, evaluation=[pool[1]])
    pool[1].image.unlink()
    with pytest.raises(DataError, match=f"^{pool[1].where}: field image: .*No such file"):
        search(pool, tmp_path)
    assert not (tmp_path / ".duplicates").exists()


def test_records_that_change_while_they_are_read_are_an_error(tmp_path: Path) -> None:
    pool = scenes(tmp_path, 3)
    orders = iter([pool, pool[::-1]])
    found = deduplicate(
        lambda: iter(next(orders)), giving([]), Duplicates(), workers=0, folder=tmp_path, say=lambda _: None
    )
    with pytest.raises(DataError, match="the records changed while they were read"):
        list(found)


@pytest.mark.parametrize("package", ["datasketch", "imagehash"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'prism-megatron\[curate\]'"):
        search(scenes(tmp_path, 1), tmp_path)
