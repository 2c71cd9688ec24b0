"""A folder's ``config.json`` as transformers' own class reads it, after ours: the one way to transformers' model.

What ``Qwen3VLShape`` refuses never gets there, so whatever comes out describes the same model as our shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.architecture.rope import in_new_words
from prism_megatron.conversion.hf.files import member, read_object
from prism_megatron.errors import ConversionError

_CLASSES: Mapping[str, Any] = {"qwen3_vl": Qwen3VLConfig, "qwen3_vl_moe": Qwen3VLMoeConfig}


def transformers_config(folder: Path) -> Any:
    """A ``Qwen3VLConfig`` or ``Qwen3VLMoeConfig``.

    Raises ConfigError as ``Qwen3VLShape.from_folder``, ConversionError for links that lead out of the folder, keys that
    stand twice, and what transformers' classes refuse.
    """
    Qwen3VLShape.from_folder(folder)
    document = in_new_words(read_object(member(folder, "config.json")))
    with transformers_reads(folder):
        return _CLASSES[document["model_type"]].from_dict(document)


@contextmanager
def transformers_reads(folder: Path) -> Iterator[None]:
    """Whatever is raised within becomes a ConversionError of one line that names ``folder``."""
    try:
        yield
    except Exception as error:  # transformers lets through whatever its parts raise about a file
        said = " ".join(str(error).split())
        raise ConversionError(f"transformers cannot read {folder}: {type(error).__name__}: {said}") from error
