#!/usr/bin/env python
"""A curation of many problems through all steps but the network: time, memory and records a second (``make
bench-curation``).

The pool is made first: synthetic questions, each with a picture of its own. Models answer in this process: a strong
one is wrong, the teacher is right nine times in ten and else once it is told. Everything else is what ``prism-curate``
runs: the search for duplicates, templates, filters, verifiers, the store with a commit before any use, files, sets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.tools.curate import CurateConfig, Endpoint, Model, Recipe, Strong
from prism_megatron.curation.calls import Call, Response
from prism_megatron.curation.duplicates.step import deduplicate
from prism_megatron.curation.identity import STORE
from prism_megatron.curation.run import curate
from prism_megatron.curation.steps import Parts
from prism_megatron.curation.storage.store import Claim, Store
from prism_megatron.data.segments import response_text

PAPER_PROBLEMS = 113_000
_CELLS, _PIXELS = 8, 32
_EVERY_SECONDS = 0.2


def make_pool(folder: Path, count: int) -> None:
    """Problems whose answers follow from their numbers, each with a picture that no other is near to."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(0)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            cells = draw.integers(0, 256, (_CELLS, _CELLS, 3), dtype=np.uint8)
            picture = Image.fromarray(cells).resize((_PIXELS, _PIXELS), Image.Resampling.NEAREST)
            picture.save(folder / "images" / f"{number}.png", compress_level=1)
            words = hashlib.sha256(str(number).encode()).hexdigest()
            question = " ".join(["In", "part", str(number), "which", *(words[i : i + 4] for i in range(0, 40, 4)), "?"])
            record = {
                "id": str(number), "image": f"images/{number}.png", "question": question, "choices": None,
                "answer": str(number), "answer_type": "integer", "solution": None, "caption": None, "source": "made",
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")


class InProcess:
    """Answers calls at once, by a rule, and stores each answer as one that came over a network."""

    def __init__(self, store: Store) -> None:
        """``store`` is its owner's to close."""
        self._store = store

    def ask(self, call: Call) -> Future[Response]:
        """Begin. As of an ``Asker``."""
        key = call.key
        known = self._store.get(key)
        if known is not None:
            done: Future[Response] = Future()
            done.set_result(known)
            return done
        if self._store.claim(key).result() is not Claim.OURS:
            raise AssertionError("one process asks each call once")
        return self._store.put(key, call, self._answer(call))

    def _answer(self, call: Call) -> Response:
        (text,) = [part["text"] for part in call.body["messages"][0]["content"] if part["type"] == "text"]
        number = text[text.index("In part ") :].split()[2]
        told = "\nRight answer:\n" in text
        is_wrong = call.role != "teacher" or (not told and int(number) % 10 == 0)
        answer = f"{number}1" if is_wrong else number
        said = response_text("Cells of many colours.", f"The part is number {number}, by its name.", answer)
        return Response("answered", said, "stop", prompt_tokens=len(text) // 4, answer_tokens=len(said) // 4)


@contextmanager
def answering(path: Path) -> Iterator[InProcess]:
    """Models in this process over a real store."""
    with closing(Store(path)) as store:
        yield InProcess(store)


@contextmanager
def watching() -> Iterator[list[tuple[float, float]]]:
    """Resident MiB of this process and its children, and when, for as long as the context lasts."""
    seen: list[tuple[float, float]] = []
    ended, here = threading.Event(), psutil.Process()

    def watch() -> None:
        while not ended.wait(_EVERY_SECONDS):
            held = here.memory_info().rss
            for child in here.children(recursive=True):
                try:
                    held += child.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            seen.append((time.monotonic(), held / 2**20))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=PAPER_PROBLEMS)
    parser.add_argument("--folder", type=Path, required=True, help="new folder for pool and result; 2 GB for 113,000")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    pool, output = given.folder / "pool", given.folder / "curated"
    began = time.monotonic()
    if not pool.exists():
        make_pool(pool, given.problems)
        print(f"{given.problems:,} problems made in {time.monotonic() - began:.0f} s", flush=True)
    endpoint = Endpoint("http://127.0.0.1:1/v1")
    teacher, strong = Model("teacher", (endpoint,)), Strong(Model("strong", (endpoint,)))
    recipe = Recipe(data=(pool,), teacher=teacher, strong=(strong,), best=6000)
    config = CurateConfig(output=output, workers=given.workers, progress_seconds=30.0)
    marks: list[tuple[float, str]] = []

    def say(text: str) -> None:
        marks.append((time.monotonic(), text))
        print(text, flush=True)

    def parts_of(folder: Path) -> Parts:
        search = partial(deduplicate, rules=recipe.duplicates, workers=given.workers, folder=folder, say=say)
        return Parts(deduplicate=search, endpoints=partial(answering, folder / STORE), say=say)

    began = time.monotonic()
    with watching() as seen:
        curate(config, recipe, parts_of, say=say)
    seconds = time.monotonic() - began
    print(f"\n{given.problems:,} problems in {seconds:.0f} s: {given.problems / seconds:,.0f} a second")
    print(f"memory, all processes: {max(held for _, held in seen):.0f} MiB at most; by tenths of the time:")
    tenth = seconds / 10
    for part in range(10):
        within = [held for at, held in seen if part * tenth <= at - began < (part + 1) * tenth]
        if within:
            print(f"  {part * tenth:6.0f} s  {max(within):6.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
