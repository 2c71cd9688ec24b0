"""Checks the answers of a file, in order: what ``prism-verify-answers`` does."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from prism_megatron.config.tools.verify_answers import VerifyAnswersConfig
from prism_megatron.data.reading.fields import check_text, kind_of, lines_of, object_of
from prism_megatron.errors import DataError
from prism_megatron.rewards.answers import plain
from prism_megatron.rewards.checker import Checker
from prism_megatron.rewards.verdict import Ask, GuardedError, Verdict

ANSWER_TYPES = ("choice", "integer", "float", "text", "bool")
_KEYS = ("id", "answer", "gold")
_AT_ONCE = 256
_AHEAD = 16


class AnswerLine(NamedTuple):
    """One line of a file of answers."""

    id: str
    ask: Ask


def read_answers(path: Path) -> list[AnswerLine]:
    """All lines of a file. Raises DataError, naming file, line and field, for the first that is malformed."""
    return [_answer_line(line, where) for where, line in lines_of(path)]


def verify_answers(config: VerifyAnswersConfig, *, say: Callable[[str], object], tell: Callable[[str], object]) -> None:
    """``say`` one line of JSON for each answer, in order, and ``tell`` what concerns all of them. Raises PrismError."""
    answers = read_answers(config.file)
    began = time.perf_counter()
    memory = int(config.memory_gb * 2**30)
    with Checker(workers=config.workers, seconds=config.check_seconds, memory_bytes=memory, say=tell) as checker:
        for line, verdict in _checked(checker, answers):
            say(json.dumps(_row(line, verdict), ensure_ascii=False))
        counts = checker.counts
    seconds = time.perf_counter() - began
    tell(
        f"{len(answers)} answers in {seconds:.1f} s: {counts['right']} right, {len(answers) - counts['right']} wrong, "
        f"of which {counts['guarded']} were guarded and {counts['killed']} ended by a limit"
    )


def _checked(checker: Checker, answers: list[AnswerLine]) -> Iterator[tuple[AnswerLine, Verdict]]:
    """In order, with some batches under way ahead of the one that is waited for."""
    batches = iter([answers[start : start + _AT_ONCE] for start in range(0, len(answers), _AT_ONCE)])

    def begun(count: int) -> Iterator[tuple[list[AnswerLine], list[Future[Verdict]]]]:
        for batch in islice(batches, count):
            yield batch, checker.submit([line.ask for line in batch])

    under_way = deque(begun(_AHEAD))
    while under_way:
        lines, futures = under_way.popleft()
        for line, future in zip(lines, futures, strict=True):
            yield line, future.result()
        under_way.extend(begun(1))


def _row(line: AnswerLine, verdict: Verdict) -> dict[str, Any]:
    row = {"id": line.id, "verdict": verdict.right, "kind": verdict.kind, "seconds": round(verdict.seconds, 6)}
    return row | ({"reason": verdict.reason} if verdict.reason else {})


def _answer_line(line: bytes, where: str) -> AnswerLine:
    fields = object_of(line, _KEYS, where, may_have=("answer_type",))
    check_text(fields["id"], "id", where)
    check_text(fields["gold"], "gold", where)
    if not isinstance(fields["answer"], str):
        raise DataError(
            f"{where}: field answer: text expected, and it is {kind_of(fields['answer'])}; put it in quotes"
        )
    answer_type = fields.get("answer_type")
    if answer_type is not None and answer_type not in ANSWER_TYPES:
        raise DataError(f"{where}: field answer_type: {', '.join(ANSWER_TYPES)} or null expected")
    try:
        plain(fields["gold"])
    except GuardedError as error:
        raise DataError(f"{where}: field gold: {error}; no answer could be compared with it") from error
    return AnswerLine(fields["id"], Ask(fields["answer"], fields["gold"], answer_type))
