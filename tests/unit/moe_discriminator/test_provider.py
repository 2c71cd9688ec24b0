"""What a saved discriminator is trained with comes from its caller; its kind from the folder."""

from __future__ import annotations

import json
from pathlib import Path

from model_providers.moe_discriminator.folder import config_text
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.engine.host.execution import Execution
from tests.distributed import tiny


def test_a_loaded_discriminator_is_trained_as_asked(tmp_path: Path) -> None:
    """Claim: every setting arrives; none of the values is a default."""
    kind = Variant(Towers(num_towers=2, experts_per_tower=3, top_k=1))
    (tmp_path / "config.json").write_text(config_text(json.dumps(tiny.CONFIG), kind))
    asked = {
        "head_dropout": 0.35,
        "load_balance_scope": "microbatch",
        "router_z_loss": 0.02,
        "freeze_vision": True,
        "execution": Execution(RecomputeConfig("full"), PrecisionConfig(transformer_engine="off"), "te"),
    }
    provider = DiscriminatorProvider.from_folder(tmp_path, **asked)  # type: ignore[arg-type]  # the literals above
    assert {name: getattr(provider, name) for name in asked} == asked
    assert provider.towers == kind.towers
