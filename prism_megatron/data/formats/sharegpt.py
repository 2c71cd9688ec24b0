"""LLaMA-Factory and ShareGPT: a list of messages, and the images that ``<image>`` stands for in their text.

Example: ``{"messages": [{"role": "user", "content": "<image>How many circles?"}, {"role": "assistant", "content":
"Two."}], "images": ["images/7.png"]}``.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.data.conversation import Conversation, Picture
from prism_megatron.data.formats.columns import column, images_of, texts_of
from prism_megatron.data.formats.files.reading import Reading, Row, finished
from prism_megatron.data.formats.turns import turns_of
from prism_megatron.errors import DataError

NOT_READ = ("videos", "audios", "tools")


def parse(row: Row, *, where: str, reading: Reading, pictures: Sequence[Picture] | None = None) -> Conversation:
    """All turns of a chat. ``pictures`` stand in for the row's own where they are stored beside it.

    Raises DataError, naming ``where`` and the field, as ``turns_of``, and for videos, sounds and tools.
    """
    for key in NOT_READ:
        if row.get(key):
            raise DataError(f"{where}: field {key}: only text and images are read; take the record out")
    identity, source, system, answer = texts_of(row, "id", "source", "system", "answer", where=where, reading=reading)
    messages = column(row, "messages", where=where, reading=reading)
    if system is not None and isinstance(messages, list):
        messages = [{"role": "system", "content": system}, *messages]
    shown = images_of(row, where=where, reading=reading) if pictures is None else pictures
    turns = turns_of(messages, shown, where=where, field="messages")
    return finished(turns, where=where, reading=reading, id=identity, source=source, answer=answer)
