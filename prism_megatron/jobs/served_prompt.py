"""A model folder that asks with a system prompt of its own, for clients that cannot send one.

Its chat template puts the prompt before a request whose first message is no system message, and leaves other requests
as they are. Everything else in it is a link to the files of the model.
"""

from __future__ import annotations

import json
from pathlib import Path

from prism_megatron.config.json_file import read_object
from prism_megatron.data.reading.model_files import (
    LEGACY_TEMPLATE,
    PROCESSOR,
    TEMPLATE,
    TOKENIZER_CONFIG,
    chat_template,
)
from prism_megatron.errors import DataError

_KEY = "chat_template"


def with_system_prompt(folder: Path, target: Path, prompt: str) -> None:
    """Make ``target``, which must not exist, such a folder of the model in ``folder``.

    Raises DataError where the model has no chat template, or several that differ.
    """
    template = before_requests_without_one(prompt) + chat_template(folder)
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name not in (TEMPLATE, LEGACY_TEMPLATE):
            (target / path.name).symlink_to(path.resolve())
    (target / TEMPLATE).write_text(template, encoding="utf-8")
    # Readers differ in which of several templates they take: the model's own may stand nowhere.
    for name in (TOKENIZER_CONFIG, PROCESSOR):
        document = read_object(folder / name, error=DataError) if (folder / name).is_file() else {}
        if _KEY in document:
            (target / name).unlink()
            del document[_KEY]
            (target / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def before_requests_without_one(prompt: str) -> str:
    """The start of a chat template: with it a request that brings no system message has this one."""
    # A literal of Python is one of Jinja.
    system = "{'role': 'system', 'content': " + repr(prompt) + "}"
    return "{%- if messages[0].role != 'system' %}{%- set messages = [" + system + "] + messages %}{%- endif %}"
