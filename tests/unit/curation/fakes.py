"""A pool of problems, models that answer in process, and a deduplicator that keeps all but what it is told."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from prism_megatron.config.tools.curate import CurateConfig, Endpoint, Model, Recipe
from prism_megatron.curation.calls import Call, Response
from prism_megatron.curation.run import curate
from prism_megatron.curation.steps import Parts
from prism_megatron.data.records import Record
from prism_megatron.data.segments import response_text

TEACHER = Model("teacher", (Endpoint("http://localhost:1/v1", at_once=4),))
JUDGE = Model("judge", (Endpoint("http://localhost:2/v1"),), temperature=0.0, max_tokens=64)
Respond = Callable[[Call], "Response | str"]


def model(name: str) -> Model:
    return Model(name, (Endpoint(f"http://localhost:3/{name}", at_once=4),))


def text_of(call: Call) -> str:
    """The text that a call asks."""
    (text,) = [part["text"] for part in call.body["messages"][-1]["content"] if part["type"] == "text"]
    assert isinstance(text, str)
    return text


def image_of(call: Call) -> str | None:
    """The data URL that a call shows."""
    urls = [part["image_url"]["url"] for part in call.body["messages"][-1]["content"] if part["type"] == "image_url"]
    return urls[0] if urls else None


def is_told(call: Call) -> bool:
    return "\nRight answer:\n" in text_of(call)


def name_of(call: Call) -> str:
    """The problem that a call is about: pools of ours ask ``How many dots has NAME?``."""
    found = re.search(r"How many dots has ([\w-]+)\?", text_of(call))
    assert found is not None, text_of(call)
    return found[1]


def good(answer: str, *, caption: str = "Some dots on a plain ground.", think: str = "I count the dots.") -> str:
    """A reply in the asked form."""
    return response_text(caption, think, answer)


def verdict(right: bool) -> str:
    return f"<verdict>{'right' if right else 'wrong'}</verdict>"


@dataclass
class FakeAsker:
    """Answers calls by a function, each once, from several threads; ``store`` outlives it, as a real one does."""

    respond: Respond
    store: dict[str, Response] = field(default_factory=dict)
    threads: int = 4
    asked: Counter[str] = field(default_factory=Counter)
    """calls that were answered anew, by key"""
    calls: list[Call] = field(default_factory=list)
    """in the order in which they came, those from the store too"""

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads)
        self._lock = threading.Lock()

    def ask(self, call: Call) -> Future[Response]:
        with self._lock:
            self.calls.append(call)
        return self._pool.submit(self._answer, call)

    def close(self) -> None:
        """The process is gone, and what its threads were at: what is counted afterwards stays as it is."""
        self._pool.shutdown(cancel_futures=True)

    def of(self, role: str) -> list[Call]:
        return [call for call in self.calls if call.role == role]

    def _answer(self, call: Call) -> Response:
        with self._lock:
            stored = self.store.get(call.key)
        if stored is not None:
            return stored
        said = self.respond(call)
        response = said if isinstance(said, Response) else answered(said)
        with self._lock:
            self.asked[call.key] += 1
            return self.store.setdefault(call.key, response)


def answered(text: str, *, finish: str = "stop", tokens: int = 10, cost: float = 0.001) -> Response:
    return Response("answered", text, finish, prompt_tokens=100, answer_tokens=tokens, cost=cost)


@dataclass(frozen=True)
class FakeVerdict:
    position: int
    kept: bool = True
    reason: str | None = None
    other: str = ""


def keep_all(
    problems: Callable[[], Iterator[Record]], _evaluation: Callable[[], Iterator[Record]]
) -> Iterator[FakeVerdict]:
    return (FakeVerdict(position) for position, _ in enumerate(problems()))


def drop(reasons: Mapping[str, str]) -> Callable[..., Iterator[FakeVerdict]]:
    """One that drops these ids for these reasons."""

    def verdicts(problems: Callable[[], Iterator[Record]], _evaluation: object) -> Iterator[FakeVerdict]:
        for position, record in enumerate(problems()):
            reason = reasons.get(record.id)
            yield FakeVerdict(position, reason is None, reason, "" if reason is None else "other")

    return verdicts


def record(name: str, answer: str = "3", **fields: Any) -> dict[str, Any]:
    """A line of a pool whose picture is its own."""
    return {
        "id": name,
        "image": f"images/{name}.png",
        "question": f"How many dots has {name}?",
        "choices": None,
        "answer": answer,
        "answer_type": "integer" if answer.lstrip("-").isdigit() else "text",
        "solution": None,
        "caption": None,
        "source": "mine",
        **fields,
    }


def write_pool(folder: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """A folder with these records and a small picture for each file that they name."""
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(dict.fromkeys(one["image"] for one in records)):
        colour = (number % 256, number // 256 % 256, 99)
        Image.new("RGB", (6, 4), colour).save(folder / name)
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
    return folder


def play(
    output: Path,
    recipe: Recipe,
    asker: FakeAsker,
    *,
    deduplicate: Callable[..., Iterator[FakeVerdict]] = keep_all,
    check_going_on: Callable[[], object] = lambda: None,
    **flags: Any,
) -> list[str]:
    """Curate, and return what was said."""
    said: list[str] = []

    @contextmanager
    def endpoints() -> Iterator[FakeAsker]:
        yield asker

    config = CurateConfig(config=Path("recipe.yaml"), output=output, workers=1, **flags)
    parts = Parts(deduplicate, endpoints, said.append, check_going_on)
    curate(config, recipe, lambda _folder: parts, say=said.append)
    return said


def rows(output: Path, step: str) -> list[dict[str, Any]]:
    """The rows of a step's file."""
    (path,) = output.glob(f"?-{step}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fates(output: Path, step: str) -> dict[str, str]:
    """By id: kept, or the reason why not."""
    return {row["problem"]["id"]: "kept" if row["kept"] else row["reason"] for row in rows(output, step)}


def files_of(folder: Path) -> dict[str, bytes]:
    """All files that a curation leaves, but for its lock."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*"))
            if one.is_file() and one.name != ".lock"}  # fmt: skip


def respond(call: Call) -> Response | str:
    """A world with a bit of everything, by the problem's name alone."""
    name = name_of(call)
    right = "B" if name == "chosen" else name[1:] or "3"
    if call.role.startswith("strong"):
        return f"<answer>{right}</answer>" if name == "p11" and call.number else "<answer>none</answer>"
    if name == "p1" and call.number < 2:
        return answered("cut", finish="length")
    if name == "p2":
        return "never a tag"
    if name in ("p3", "p4") and not is_told(call):
        return good("99")
    return good("98" if name == "p4" else right, caption=f"The picture of {name} has ünïcode dots.")
