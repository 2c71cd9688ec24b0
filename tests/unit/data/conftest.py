"""One mini processing folder for all data tests; building it takes about two seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.data.render import Renderer
from prism_megatron.data.tokenizer import save_mini_processing


@pytest.fixture(scope="session")
def mini_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    save_mini_processing(folder)
    return folder


@pytest.fixture(scope="session")
def renderer(mini_folder: Path) -> Renderer:
    return Renderer.from_folder(mini_folder)
