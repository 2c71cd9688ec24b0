"""Flags of precision and recompute reach both models, the format of their batches and the printed table.

Engines, rollout and the machine are fakes; the command line, the mini's folders and the providers are real.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_megatron.config.cli import parse
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.engine.capabilities import Installed
from prism_megatron.errors import ConfigError
from prism_megatron.stages import align_build, assembly
from prism_megatron.stages.align_build import build_run

FLAGS = "--dtype bf16 --fp8 e4m3 --fp8-recipe blockwise --recompute full --recompute-vision"


class FakeEngine:
    """Keeps the provider it was given."""

    def __init__(self, *, provider: Any, **_keywords: Any) -> None:
        self.provider = provider
        self.optimizer = "an optimizer"

    def load_hf(self, _source: Any) -> None:
        pass


@pytest.fixture
def run_on(monkeypatch: pytest.MonkeyPatch) -> Any:
    for module in (assembly, align_build):
        monkeypatch.setattr(module, "MegatronEngine", FakeEngine)
    monkeypatch.setattr(align_build, "build_replicas", lambda *_args, **_keywords: None)
    monkeypatch.setattr(align_build, "inner_optimizers", lambda _optimizer: [])
    world: Any = SimpleNamespace(parallel=ParallelConfig(), device=torch.device("cpu"))

    def run(machine: Installed, flags: str) -> tuple[Any, list[str]]:
        monkeypatch.setattr(align_build, "installed", lambda: machine)
        said: list[str] = []
        return build_run(parse(flags.split()), world, fresh=True, say=said.append), said

    return run


def test_flags_reach_both_models_and_their_batches(run_on: Any) -> None:
    run, said = run_on(Installed("2.13.0", (9, 0), transformer_engine="2.20.2"), FLAGS)
    for engine in (run.players.policy, run.players.discriminator):
        model = engine.provider
        assert (model.precision.fp8, model.precision.fp8_recipe, model.layers) == ("e4m3", "blockwise", "te")
        assert (model.recompute.recompute, model.recompute.recompute_vision) == ("full", True)
    assert run.plan.form.length_multiple == 16
    assert any(line.startswith("fp8") and "e4m3, blockwise" in line for line in said)


def test_defaults_keep_activations_and_use_torch_without_transformer_engine(run_on: Any) -> None:
    run, said = run_on(Installed("2.13.0"), "")
    for engine in (run.players.policy, run.players.discriminator):
        model = engine.provider
        assert (model.precision.fp8, model.layers, model.recompute.recompute) == ("none", "torch", "none")
    assert run.plan.form.length_multiple == 1
    assert any("Transformer Engine is not installed" in line for line in said)


def test_fp8_without_transformer_engine_stops_the_run(run_on: Any) -> None:
    with pytest.raises(ConfigError, match="--fp8 e4m3 needs Transformer Engine"):
        run_on(Installed("2.13.0"), FLAGS)
