"""Writes conversations as a folder of ours: one question about one image a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prism_megatron.data.conversation import Conversation, Picture
from prism_megatron.data.formats.ours import FILE
from prism_megatron.data.formats.pictures import data_of, extension_of
from prism_megatron.data.segments import parse_response
from prism_megatron.errors import DataError

_ELSE = "write it --to webdataset, which holds any conversation"


class OursWriter:
    """Adds records to a folder that is empty at first; ``close`` when the last one was added."""

    def __init__(self, folder: Path, *, drop_system: bool) -> None:
        self._folder = folder
        self._drop_system = drop_system
        self._count = 0
        (folder / "images").mkdir()
        self._file = (folder / FILE).open("w", encoding="utf-8")

    def add(self, conversation: Conversation, *, where: str) -> None:
        """Raises DataError, naming ``where``, for what the nine fields do not hold: another number of turns or images.

        The bodies of a tagged response become caption, solution and answer, without the line ends around them; any
        other text becomes the answer.
        """
        picture, question = self._question(conversation, where)
        fields = _fields(conversation, question)
        extension = extension_of(picture, where=where)
        name = f"images/{self._count:09d}.{extension}"
        (self._folder / name).write_bytes(data_of(picture, where=where))
        self._count += 1
        self._file.write(json.dumps({"id": conversation.id, "image": name, **fields}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()

    def _question(self, conversation: Conversation, where: str) -> tuple[Picture, str]:
        turns = conversation.turns
        if turns[0].role == "system":
            if not self._drop_system:
                raise DataError(
                    f"{where}: has a system message, which ours has no field for; --drop-system, or {_ELSE}"
                )
            turns = turns[1:]
        parts = turns[0].parts
        if len(turns) != 2 or len(parts) != 2 or not isinstance(parts[0], Picture) or not isinstance(parts[1], str):
            raise DataError(
                f"{where}: {len(turns)} turns and {len(conversation.pictures)} images; "
                f"ours holds one image and then one question, answered once; {_ELSE}"
            )
        return parts[0], parts[1]


def _fields(conversation: Conversation, question: str) -> dict[str, Any]:
    text = "".join(part for part in conversation.turns[-1].parts if isinstance(part, str))
    parsed = parse_response(text.encode())
    caption = solution = None
    answer = text
    if not isinstance(parsed, str):
        caption, solution, answer = _body(parsed.caption), _body(parsed.think), parsed.answer
    return {
        "question": question,
        "choices": None,
        "answer": answer,
        "answer_type": "text",
        "solution": solution,
        "caption": caption,
        "source": conversation.source,
    }


def _body(text: str) -> str:
    return text.removeprefix("\n").removesuffix("\n")
