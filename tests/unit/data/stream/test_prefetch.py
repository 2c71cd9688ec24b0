"""Rows arrive in the plan's order with their labels, whoever reads them, and each rank reads its own share."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prism_megatron.data.formats.conversations import ConversationLines
from prism_megatron.data.index.index import open_index
from prism_megatron.data.index.samples import IndexedCorpus, samples_of
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.stream.mixture import Mixture
from prism_megatron.data.stream.plan import START, Cost, Packing, Plan
from prism_megatron.data.stream.prefetch import Item, LoadedStep, Loader, SampleReader
from prism_megatron.data.workers import in_workers
from prism_megatron.errors import DataError
from tests.unit.data.conversation_files import Tally, write_conversations

Building = Callable[..., Loader]


@pytest.fixture
def building(renderer: Renderer, tmp_path: Path) -> Building:
    """Loaders over two files of 40 and 30 conversations, 70 to an epoch."""
    render = ConversationRenderer(renderer, label_turns="last")
    paths = [write_conversations(tmp_path / name, count, seed=count) for name, count in (("x", 40), ("y", 30))]
    sets = []
    for path in paths:
        corpus = ConversationLines(path)
        how: dict[str, Any] = {"validation_share": 0.0, "on_bad": "fail", "workers": 0, "counting": Tally()}
        sets.append(IndexedCorpus(corpus, open_index(corpus, render, tmp_path / "indexes", **how)))
    samples = samples_of(sets, part="train", max_tokens=256)

    def built(**changes: Any) -> Loader:
        plan = Plan(samples, Mixture(samples, {}, seed=1), packing=Packing(256, 1), seed=1, epochs=1)
        how: dict[str, Any] = {
            "cost": Cost(1.0, 0.0, 0.0),
            "packs_per_step": 3,
            "dp_rank": 0,
            "dp_size": 1,
            "workers": 0,
            "ahead": 2,
            "on_bad": "fail",
            "filler_id": renderer.pad_token_id,
        }
        return Loader(plan, render, **how | changes)

    return built


def plain(steps: Iterator[LoadedStep]) -> list[Any]:
    """Steps as what can be compared."""
    return [
        (
            step.after,
            [
                (
                    pack.samples,
                    pack.skipped,
                    [
                        (row.token_ids, tuple(mask), tuple(image.pixel_values_P_D.tobytes() for image in row.images))
                        for row, mask in pack.rows
                    ],
                )
                for pack in step.packs
            ],
        )
        for step in steps
    ]


def test_steps_hold_what_the_plan_says(building: Building, renderer: Renderer) -> None:
    """Claim: every sample once, rendered as by itself, with the labels that the index counted."""
    loader = building()
    samples = loader.plan.samples
    seen: Counter[int] = Counter()
    for step in loader.steps(START):
        for pack in step.packs:
            seen.update(pack.samples)
            assert sum(len(row.token_ids) for row, _ in pack.rows) <= 256 and not pack.skipped
            for sample, (row, mask) in zip(pack.samples, pack.rows, strict=True):
                assert len(row.token_ids) == len(mask) == samples.tokens[sample]
                assert sum(mask) == samples.label_tokens[sample]
                where = samples.sets[samples.set_number[sample]]
                assert f"Question {samples.row[sample]}?" in renderer.decode(row.token_ids)
                assert where.index.where(int(samples.row[sample])) == samples.where(sample)
    assert seen == Counter(range(70))


def test_workers_change_nothing(building: Building) -> None:
    """Claim: 0, 1 and 2 processes give the same steps bit for bit, from the middle too, and no process is left."""
    whole = plain(building().steps(START))
    for workers in (1, 2):
        assert plain(building(workers=workers).steps(START)) == whole
    assert plain(building(workers=1).steps(whole[1][0])) == whole[2:]
    assert not multiprocessing.active_children()


def test_ranks_read_their_own_shares(building: Building, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: over DP1, DP2, DP4 the ranks' packs of a step are the same ones; all ranks have equally many, filled up
    with packs that hold no label; nobody reads another's records."""
    reads: list[int] = []
    read = SampleReader.__call__

    def counted(self: SampleReader, item: Item) -> Any:
        reads.append(len(item))
        return read(self, item)

    monkeypatch.setattr(SampleReader, "__call__", counted)
    whole = [sorted(pack.samples for pack in step.packs) for step in building(packs_per_step=6).steps(START)]
    for dp_size in (2, 4):
        reads.clear()
        ranks = [
            list(building(packs_per_step=6, dp_rank=rank, dp_size=dp_size).steps(START)) for rank in range(dp_size)
        ]
        assert sum(reads) == 70
        for number, steps in enumerate(zip(*ranks, strict=True)):
            assert len({step.after for step in steps}) == len({len(step.packs) for step in steps}) == 1
            packs = [pack for step in steps for pack in step.packs]
            assert sorted(pack.samples for pack in packs if pack.samples) == whole[number]
            for pack in packs:
                assert pack.rows and (pack.samples or not any(pack.rows[0][1]))


def test_records_that_cannot_be_read_end_the_run_by_name(building: Building, tmp_path: Path) -> None:
    """Claim: pixels are read only now, so a damaged image is found now: by file and line, from a worker too."""
    damage(tmp_path / "x" / "images" / "2.png")
    for workers in (0, 1):
        with pytest.raises(
            DataError, match=rf"^{tmp_path}/x/data\.jsonl:\d+: r\d+: .*2\.png: the image cannot be read"
        ):
            list(building(workers=workers).steps(START))


def test_records_that_cannot_be_read_are_skipped_where_asked(building: Building, tmp_path: Path) -> None:
    """Claim: the rest of the pack is as before, what is missing is said, and a pack that lost all has no labels."""
    before = plain(building().steps(START))
    for name in "0123":
        damage(tmp_path / "x" / "images" / f"{name}.png")
    after = plain(building(on_bad="skip", workers=1).steps(START))
    assert [step[0] for step in after] == [step[0] for step in before]
    skipped = [reason for _, packs in after for pack in packs for reason in pack[1]]
    assert 0 < len(skipped) <= 40 and all("x/data.jsonl:" in reason for reason in skipped)
    rows = {sample: row for _, packs in before for pack in packs for sample, row in zip(pack[0], pack[2], strict=True)}
    read = [
        (sample, row) for _, packs in after for pack in packs for sample, row in zip(pack[0], pack[2], strict=False)
    ]
    assert len(read) == 70 - len(skipped) and all(rows[sample] == row for sample, row in read)


def test_an_image_that_was_exchanged_is_noticed(building: Building, tmp_path: Path) -> None:
    Image.new("RGB", (32, 128)).save(tmp_path / "y" / "images" / "1.png")
    with pytest.raises(DataError, match=r"y/data\.jsonl:\d+: it was indexed with \d+ tokens and has \d+: .*remove"):
        list(building().steps(START))


def test_workers_end_when_their_rank_says_so_and_a_lost_one_is_an_error(building: Building) -> None:
    """Claim: a SIGTERM of somebody else (to the whole group) is the rank's affair, which may need another step; its own
    ends a worker, as when a rank exits with a loader open; a loader that lost one says so."""
    for sender in ("rank", "kernel"):
        others = set(multiprocessing.active_children())
        steps = building(workers=1, ahead=1, packs_per_step=1).steps(START)
        next(steps)
        (worker,) = set(multiprocessing.active_children()) - others
        assert worker.pid is not None
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        next(steps)
        worker.join(2.0)
        assert worker.is_alive()
        os.kill(worker.pid, signal.SIGTERM if sender == "rank" else signal.SIGKILL)
        worker.join(20.0)
        assert not worker.is_alive()
        how = "with status 1" if sender == "rank" else "by SIGKILL"
        with pytest.raises(DataError, match=f"a process that reads records was ended from outside, {how}"):
            list(steps)


def test_a_bug_in_a_worker_ends_the_rank_with_its_traceback() -> None:
    steps = in_workers(reciprocal, iter([2, 0, 4]), workers=1, ahead=2)
    assert next(steps) == 0.5
    with pytest.raises(RuntimeError, match=r"in a process that reads records:\nTraceback[\s\S]*ZeroDivisionError"):
        next(steps)


def reciprocal(value: int) -> float:
    return 1 / value


def test_a_reader_returns_its_error(building: Building, tmp_path: Path) -> None:
    """Claim: it is not raised in a worker, whose traceback would come before its one line."""
    loader = building()
    damage(tmp_path / "x" / "images" / "0.png")
    found = [loader.reader(((0, row, int(length)),)) for row, length in enumerate(loader.plan.samples.tokens[:40])]
    assert {type(one) for one in found} == {list, DataError}


def damage(path: Path) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (32, 32 * (int(path.stem) + 1), 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    path.write_bytes(path.read_bytes()[:-1500])
