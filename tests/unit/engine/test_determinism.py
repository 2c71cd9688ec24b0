"""What ``--deterministic`` tells torch and the libraries, and what it refuses. Blind to kernels, which GPUs have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.commands.align import parse
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.engine.host.determinism import be_deterministic
from prism_megatron.errors import ConfigError


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_every_library_is_told() -> None:
    environment = {"HOME": "/home"}
    be_deterministic(environment)
    assert torch.are_deterministic_algorithms_enabled()
    assert environment == {
        "HOME": "/home",
        "NCCL_ALGO": "Ring",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }


def test_what_a_user_has_set_stands_if_it_is_deterministic() -> None:
    given = {"NCCL_ALGO": "Tree", "CUBLAS_WORKSPACE_CONFIG": ":16:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    environment = dict(given)
    be_deterministic(environment)
    assert environment == given


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_ALGO", "NVLS"),
        ("NCCL_ALGO", ""),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
    ],
)
def test_what_is_set_otherwise_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--deterministic needs {name} to be .*; set it so, or unset it"):
        be_deterministic({name: value})
    assert not torch.are_deterministic_algorithms_enabled()


def test_megatron_is_told_too() -> None:
    """Claim: the flag reaches the config of every layer, and is off where nobody asks."""
    provider = Qwen3VLProvider(Qwen3VLShape.from_folder(MINI_FOLDER / "policy"))
    for parallel in (parse(["--deterministic"]).parallel, parse([]).parallel, ParallelConfig()):
        config = provider.transformer_config(parallel, torch.float32)
        assert config.deterministic_mode is parallel.deterministic
    assert parse(["--deterministic"]).parallel.deterministic
