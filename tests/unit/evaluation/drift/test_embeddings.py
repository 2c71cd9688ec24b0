"""Static embeddings from files: by hand, and errors that name what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from prism_megatron.errors import ConfigError
from prism_megatron.evaluation.drift import embeddings
from prism_megatron.evaluation.drift.embeddings import read_embeddings

TABLE = np.array([[0.0, -2.0], [3.0, 0.0], [0.0, 4.0], [9.0, 9.0], [1.0, 1.0]], dtype=np.float16)
VOCABULARY = {"?": 0, "red": 1, "cat": 2, "\n": 3, " ": 4}


def files(folder: Path, table: np.ndarray[tuple[int, ...], np.dtype[np.float16]] = TABLE) -> Path:
    """A tokenizer whose white space has tokens, and a table, where wordllama has its own."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="?"))
    tokenizer.pre_tokenizer = Split(" ", "isolated")
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(1)
    for name in ("tokenizers", "weights"):
        (folder / name).mkdir()
    tokenizer.save(str(folder / "tokenizers" / "some.json"))
    save_file({"embedding.weight": table}, folder / "weights" / "some.safetensors")
    return folder


def test_a_text_is_the_mean_of_its_tokens_made_one_long(tmp_path: Path) -> None:
    """By hand, within 1e-12: red, cat and the space between have (4, 5) in all; nothing of padding or cutting off."""
    embed = read_embeddings(files(tmp_path))
    assert embed is not None
    found = embed(["red cat", "red", "  red \n\n cat ", "", "\ud800"])
    assert found[0] == pytest.approx(np.array([4.0, 5.0]) / np.hypot(4, 5), abs=1e-12)
    assert found[1].tolist() == [1.0, 0.0]
    assert (found[2] == found[0]).all(), "layout is no token"
    assert found[3].tolist() == [0.0, 0.0] and found[4].tolist() == [0.0, -1.0], "no token, and one that is not known"
    many = [f"red {'cat ' * (number % 5)}" for number in range(600)]
    assert (embed(many)[511] == embed([many[511]])[0]).all()


def test_files_beside_each_other_are_found_too(tmp_path: Path) -> None:
    folder = files(tmp_path)
    for file in (*folder.glob("*/*.json"), *folder.glob("*/*.safetensors")):
        file.rename(folder / file.name)
    embed = read_embeddings(folder)
    assert embed is not None and embed.source == folder / "some.safetensors"


def test_without_a_folder_the_installed_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: its files are found without an import; without the package there are no embeddings, and no error."""
    package = tmp_path / "a_package_of_words"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    files(package)
    monkeypatch.setattr(embeddings, "PACKAGE", package.name)
    assert read_embeddings(None) is None
    monkeypatch.syspath_prepend(tmp_path)
    embed = read_embeddings(None)
    assert embed is not None and embed.source == package / "weights" / "some.safetensors"


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 0 files \*.json; name a folder with one tokenizer"):
        read_embeddings(tmp_path)
    folder = files(tmp_path, TABLE[:4])
    with pytest.raises(ConfigError, match=r"a row for each of the 5 tokens of .*, and it holds \[\(4, 2\)\]"):
        read_embeddings(folder)
    (folder / "weights" / "some.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_embeddings(folder)
