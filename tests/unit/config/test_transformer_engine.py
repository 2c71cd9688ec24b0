"""Which versions of Transformer Engine a run is started with. None is installed here: versions are told."""

from __future__ import annotations

import pytest

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine import precision as precision_module
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig, check_precision
from prism_megatron.config.engine.transformer_engine import why_unfit
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.errors import ConfigError

ASKED = (PrecisionConfig(transformer_engine="on"), PrecisionConfig(fp8="hybrid"))
GATHERED = ParallelConfig(cp=2)
SHAPE = Qwen3VLShape.from_folder(MINI_FOLDER / "policy")


def check(monkeypatch: pytest.MonkeyPatch, found: str | None, parallel: ParallelConfig, *, packs: bool = True) -> None:
    """Both ways to ask, with this version installed."""
    monkeypatch.setattr(precision_module, "installed_transformer_engine", lambda: found)
    for precision in ASKED:
        check_precision(precision, parallel, SHAPE, dtype="bf16", packs=packs)


@pytest.mark.parametrize("found", ["2.3", "2.3.0+abc", "2.9.1", "2.10", "2.20.2", "2.99"])
def test_versions_that_the_code_is_written_for(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are compared as numbers: 2.10 is later than 2.3."""
    assert why_unfit(found) is None
    check(monkeypatch, found, ParallelConfig())


@pytest.mark.parametrize("found", ["1.13.0", "2.2.9", "3.0", "3.0.0.dev1", "10.1", "main"])
def test_other_versions_are_refused_where_they_are_asked_for(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_module, "installed_transformer_engine", lambda: found)
    for precision, flag in zip(ASKED, ("--transformer-engine on", "--fp8 hybrid"), strict=True):
        with pytest.raises(ConfigError, match=rf"{flag}: Transformer Engine .* is here, .* written for 2\.3 and later"):
            check_precision(precision, ParallelConfig(), SHAPE, dtype="bf16")
    check_precision(PrecisionConfig(), GATHERED, SHAPE, dtype="bf16")


def test_packed_sequences_with_gathered_keys_need_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"packed sequences needs Transformer Engine 2\.20 or newer, and 2\.11"):
        check(monkeypatch, "2.11.0", GATHERED)
    check(monkeypatch, "2.20.0", GATHERED)
    check(monkeypatch, "2.11.0", GATHERED, packs=False)
    check(monkeypatch, "2.11.0", ParallelConfig(cp=2, cp_comm="a2a"))
    check(monkeypatch, "2.11.0", ParallelConfig())


def test_what_is_missing_is_named_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a machine without it is told of CUDA too, in one message (``capabilities.choose``)."""
    check(monkeypatch, None, GATHERED)
