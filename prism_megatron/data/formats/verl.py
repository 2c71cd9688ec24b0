"""verl's Parquet for reinforcement learning: a prompt of messages, images, and a checkable answer.

It has no demonstration: the answer alone is learned, where ``--plain-answers`` asks for that.

Example: ``{"data_source": "geo3k", "prompt": [{"role": "user", "content": "<image>How many circles?"}], "images":
[{"bytes": …}], "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"split": "train", "index": 7}}``.
"""

from __future__ import annotations

from typing import Any

from prism_megatron.data.conversation import Conversation, Turn
from prism_megatron.data.formats.columns import FIELDS, column, images_of, texts_of
from prism_megatron.data.formats.files.reading import Reading, Row, demonstration, finished, names_of, text_in
from prism_megatron.data.formats.turns import question_turn, turns_of
from prism_megatron.data.reading.fields import check_text
from prism_megatron.errors import DataError


def parse(row: Row, *, where: str, reading: Reading) -> Conversation:
    """The prompt, answered by the ground truth. Raises DataError, naming ``where`` and the field."""
    answer = ground_truth(row, where)
    response = demonstration(None, None, answer, where=where, reading=reading)
    return answered(row, response, answer, where=where, reading=reading)


def answered(row: Row, response: str, answer: str | None, *, where: str, reading: Reading) -> Conversation:
    """The prompt, with ``response`` as the assistant's turn. Raises DataError as ``turns_of``."""
    identity, source = texts_of(row, "id", "source", where=where, reading=reading)
    prompt = _prompt(row, where, reading)
    images = images_of(row, where=where, reading=reading)
    if isinstance(prompt, str):
        check_text(prompt, "prompt", where)
        turns: tuple[Turn, ...] = (question_turn(prompt, images, where=where), Turn("assistant", (response,)))
    elif not isinstance(prompt, list):
        raise DataError(f"{where}: field prompt: a list of messages, or text, expected")
    else:
        turns = turns_of([*prompt, {"role": "assistant", "content": response}], images, where=where, field="prompt")
    return finished(turns, where=where, reading=reading, id=identity or _id(row), source=source, answer=answer)


def _prompt(row: Row, where: str, reading: Reading) -> Any:
    """Called so, unless another name was given; what is beside it as ``question`` may be the bare question."""
    if row.get("prompt") is not None and "question" not in names_of(reading.config.columns, FIELDS):
        return row["prompt"]
    return column(row, "question", where=where, reading=reading)


def ground_truth(row: Row, where: str) -> str | None:
    """What ``reward_model`` says, or None. Raises DataError for anything but text or a number."""
    reward = row.get("reward_model")
    if reward is None:
        return None
    if not isinstance(reward, dict):
        raise DataError(f"{where}: field reward_model: an object with ground_truth expected")
    return text_in(reward.get("ground_truth"), "reward_model.ground_truth", where)


def _id(row: Row) -> str | None:
    """Source, split and index, where the set numbers its records."""
    info: Any = row.get("extra_info")
    if not isinstance(info, dict) or not isinstance(info.get("index"), int):
        return None
    return "/".join(
        str(part) for part in (row.get("data_source"), info.get("split"), info["index"]) if part is not None
    )
