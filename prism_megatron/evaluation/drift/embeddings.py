"""Texts as points, by static embeddings of tokens: the mean of a text's, made one long.

Runs of white space are read as one space: line breaks are tokens too, and layout would be most of a distance that is
to be one of words. Proxies see layout.

What is read is a folder with one tokenizer (``*.json``, as the package tokenizers writes it) and one table of
embeddings (``*.safetensors`` with one matrix, a row a token), such as the files that wordllama ships. They know nothing
of the policy and of the order of words, and are the same for every run and stage that is compared.

Shape suffixes: N texts, V tokens of the vocabulary, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from prism_megatron.errors import ConfigError
from prism_megatron.evaluation.drift.relabelling import Array

PACKAGE = "wordllama"
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class StaticEmbeddings:
    """A tokenizer and a row of ``table_V_D`` for each of its tokens."""

    source: Path
    tokenizer: Any
    table_V_D: Array

    def __call__(self, texts: Sequence[str]) -> Array:
        """``[N, D]``, each of length one; of length zero for a text without tokens."""
        points_N_D = np.zeros((len(texts), self.table_V_D.shape[1]))
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = [_as_words(text) for text in texts[start : start + _TEXTS_AT_ONCE]]
            encoded = self.tokenizer.encode_batch(part, add_special_tokens=False)
            for number, one in enumerate(encoded, start=start):
                if one.ids:
                    mean_D = self.table_V_D[one.ids].mean(0)
                    points_N_D[number] = mean_D / max(float(np.linalg.norm(mean_D)), 1e-300)
        return points_N_D


def _as_words(text: str) -> str:
    return " ".join(text.split()).encode("utf-8", errors="replace").decode()


def installed_files() -> tuple[Path, Path] | None:
    """Tokenizer and table of the installed wordllama, which is not imported; None where it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    found = sorted(folder.glob("tokenizers/*.json")), sorted(folder.glob("weights/*.safetensors"))
    return (found[0][0], found[1][0]) if found[0] and found[1] else None


def read_embeddings(folder: Path | None) -> StaticEmbeddings | None:
    """Those of ``folder``; without one the installed wordllama's, or None.

    Raises ConfigError where they cannot be read, or where tokenizer and table do not belong together.
    """
    files = installed_files() if folder is None else _files_of(folder)
    if files is None:
        return None
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    tokens, table = files
    try:
        tokenizer, tensors = Tokenizer.from_file(str(tokens)), load_file(table)
    except Exception as error:  # both libraries raise what their Rust parts raise
        raise ConfigError(f"--embeddings: {tokens} and {table} cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    matrices = [one for one in tensors.values() if one.ndim == 2]
    if len(matrices) != 1 or len(matrices[0]) < tokenizer.get_vocab_size():
        raise ConfigError(
            f"--embeddings: {table} must hold one matrix, with a row for each of the {tokenizer.get_vocab_size()} "
            f"tokens of {tokens}, and it holds {[tuple(one.shape) for one in tensors.values()]}"
        )
    return StaticEmbeddings(table, tokenizer, matrices[0].astype(np.float64))


def _files_of(folder: Path) -> tuple[Path, Path]:
    """The only files of their kinds in the folder, or in wordllama's own folders below it."""
    found = []
    for kind, below in (("json", "tokenizers"), ("safetensors", "weights")):
        files = sorted(folder.glob(f"*.{kind}")) or sorted(folder.glob(f"{below}/*.{kind}"))
        if len(files) != 1:
            raise ConfigError(
                f"--embeddings {folder} has {len(files)} files *.{kind}; name a folder with one tokenizer (*.json) and "
                "one table (*.safetensors), such as wordllama's"
            )
        found.append(files[0])
    return found[0], found[1]
