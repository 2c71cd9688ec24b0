"""Claim: a rank's worst moment is the sum of what is held then, and a refusal says by how much which flag helps.

The oracle is arithmetic by hand, in whole GiB. Blind spot: the counts themselves (tests/distributed/test_counted.py).
"""

from __future__ import annotations

import pytest

from prism_megatron.engine.dry.counted import Counted
from prism_megatron.errors import ConfigError
from prism_megatron.forecast.verdict import GIB, RankNeed, check_fits, table


def counted(*gib: int) -> Counted:
    """Parameters, gradients, optimizer, peak of the pass, peak of the step."""
    return Counted(*(size * GIB for size in gib))


POLICY, JUDGE = counted(1, 2, 3, 10, 4), counted(2, 4, 6, 3, 7)


def test_the_other_role_rests_whole_or_with_its_weights_alone() -> None:
    """Claim: policy 6 held + 10 + judge 12 and judge 12 + 7 + policy 6, each beside 5 that only read."""
    roles = {"policy": POLICY, "discriminator": JUDGE}
    assert RankNeed(0, roles, beside=5 * GIB).at_worst() == ("policy", 33 * GIB)
    assert RankNeed(0, roles, offloaded=["discriminator"]).at_worst() == ("discriminator", 25 * GIB)
    assert RankNeed(0, roles, offloaded=list(roles)).at_worst() == ("discriminator", 20 * GIB)


def test_what_fits_to_the_byte_is_let_pass() -> None:
    """Claim: the reserve is taken off once, and nothing else."""
    need = RankNeed(0, {"policy": POLICY})
    check_fits([need], device_gib=20, reserve_gib=4, recompute="none", rows_flag="--max-tokens")
    with pytest.raises(ConfigError, match=r"rank 0 needs 16\.00 GiB .* has 15\.50 beside --device-reserve-gib 4\.5"):
        check_fits([need], device_gib=20, reserve_gib=4.5, recompute="none", rows_flag="--max-tokens")


def test_a_refusal_names_the_flags_that_act_on_what_is_large() -> None:
    """Claim: the rank that needs most is named; an offload's gain is counted, and offered only where there is one."""
    small, large = RankNeed(0, {"policy": POLICY}), RankNeed(7, {"policy": POLICY, "discriminator": JUDGE})
    with pytest.raises(ConfigError, match=r"rank 7 needs 28\.00 GiB in the step of the policy") as found:
        check_fits([small, large], device_gib=25, reserve_gib=4, recompute="none", rows_flag="--rows")
    said = str(found.value)
    assert "--policy.offload --discriminator.offload brings this down to 20.00 GiB, which fits" in said
    assert "--recompute full and a smaller --rows are for the 10.00 GiB" in said
    with pytest.raises(ConfigError) as found:
        check_fits([small], device_gib=9, reserve_gib=4, recompute="full", rows_flag="--rows")
    assert "offload" not in str(found.value)
    assert "--recompute" not in str(found.value)


def test_the_table_has_a_row_for_each_role_and_a_sum() -> None:
    """Claim: figures are those that were counted, in GiB."""
    lines = table([RankNeed(3, {"policy": POLICY}, beside=5 * GIB)])
    assert lines[1].split() == ["3", "policy", "1.00", "2.00", "3.00", "10.00", "4.00"]
    assert "at most 21.00 GiB, in the step of the policy, 5.00 of it" in lines[2]
