"""300 problems that were planted again, changed: how many are found, and what else is called a duplicate."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from prism_megatron.config.tools.curate import Duplicates
from prism_megatron.curation.duplicates.step import deduplicate
from prism_megatron.curation.duplicates.words import answer_of, is_telling
from prism_megatron.data.records import read_records
from tests.unit.curation.duplicates.planted import PICTURES, by_id, giving, plant, scenes

ALIKE_INDEED = {"tabmwp-dev1k-6670"}
"""Asks what tabmwp-test1k-5343 asks, about a table that differs in one name (the Lynches' pool), and has its answer."""


def test_planted_problems_are_found_and_others_are_left(shared_dir: Path, tmp_path: Path) -> None:
    """Claim: of 300 planted copies, of 240 real and 60 drawn problems, 95 % of each kind are found, each as a copy of
    its original, and nothing else is refused. Yes and no in other words, and cropped pictures, are counted apart.

    Blind spot: other words are few patterns, and pictures are changed in one way at a time.
    """
    draw = random.Random(11)
    sets = [list(read_records(shared_dir / "data" / name, purpose="train")) for name in ("tabmwp", "puzzlevqa", "nlvr")]
    pool = [one for records in sets for one in draw.sample(records, 80)] + scenes(tmp_path, 60)
    kinds = list(PICTURES)
    planted, kind_of = [], {}
    for number, original in enumerate(draw.sample(pool, len(pool))):
        kind = kinds[number % len(kinds)]
        planted.append(plant(tmp_path, original, kind, draw))
        telling = kind != "other words" or is_telling(answer_of(original))
        kind_of[planted[-1].id] = kind if telling else "other words, yes or no"
    records = [*pool, *planted]

    found = by_id(
        records,
        list(deduplicate(giving(records), giving([]), Duplicates(), workers=0, folder=tmp_path, say=print)),
    )

    asked, right = Counter(kind_of.values()), Counter[str]()
    for one in planted:
        verdict = found[one.id]
        right[kind_of[one.id]] += verdict.other == one.id.removeprefix("planted-")
        assert verdict.kept or verdict.other == one.id.removeprefix("planted-"), one.id
    refused = sum(not verdict.kept for verdict in found.values())
    for kind in sorted(asked):
        print(f"{kind:<24} {right[kind]:>3} of {asked[kind]} found")
    print(f"precision {right.total()} of {refused}")
    assert asked.total() == 300
    assert {one.id for one in pool if not found[one.id].kept} <= ALIKE_INDEED
    for kind in asked.keys() - {"cropped", "other words, yes or no"}:
        assert right[kind] >= 0.95 * asked[kind], kind
    assert {found[id_].reason for id_, kind in kind_of.items() if kind == "as a PNG"} == {"the same as"}
