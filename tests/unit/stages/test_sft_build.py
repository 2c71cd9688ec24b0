"""How often an epoch of fine-tuning shows each source."""

from __future__ import annotations

from prism_megatron.config.demonstrations import DemonstrationsConfig
from prism_megatron.stages.sft.build import _times
from tests.unit.data.stream.test_plan import samples_of_lengths


def test_weights_are_shares_of_an_epoch() -> None:
    """Claim: of 80 and 20 records, weights of 1 and 3 make 25 and 75 of 100; repeats are taken as they are."""
    samples = samples_of_lengths([8] * 100, [0] * 80 + [1] * 20)
    assert _times(DemonstrationsConfig(weights=("a=1", "b=3")), samples) == {"a": 25 / 80, "b": 75 / 20}
    assert _times(DemonstrationsConfig(repeats=("a=0.5",)), samples) == {"a": 0.5}
    assert _times(DemonstrationsConfig(), samples) == {}
