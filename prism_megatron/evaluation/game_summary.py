"""What the summary of a run says of the game between policy and discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_megatron.observability.catalogue import ROLES
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.summary import largest, pooled, total, window
from prism_megatron.types import TOWER_NAMES


def game_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of the last ten steps with their counts, and totals of all.

    Shares and gaps are weighted by their counts, which stand beside them; totals and the largest gradient norms are
    those of all steps. A share without data is None beside a count of 0.
    """
    last = window(rows)
    return {
        "policy_version": rows[-1].get("policy_version") if rows else None,
        "reward_gap": {tower: pooled(last, f"{tower}/reward_gap") for tower in TOWER_NAMES},
        "disc_accuracy": {tower: pooled(last, f"{tower}/accuracy") for tower in TOWER_NAMES},
        "pairs": {tower: total(last, f"{tower}/pairs") for tower in TOWER_NAMES},
        "auc": {tower: pooled(last, f"{tower}/auc") for tower in TOWER_NAMES},
        "auc_pairs": {tower: total(last, f"{tower}/auc_pairs") for tower in TOWER_NAMES},
        "length_correlation": {tower: pooled(last, f"{tower}/length_correlation") for tower in TOWER_NAMES},
        "tower_agreement": pooled(last, "tower_agreement"),
        "rollbacks": total(rows, "rolled_back"),
        "valid_share": pooled(last, "valid_share"),
        "valid_rollouts": total(last, "valid_rollouts"),
        "rollouts": total(last, "rollouts"),
        "totals": {
            "pairs": {tower: total(rows, f"{tower}/pairs") for tower in TOWER_NAMES},
            "valid_rollouts": total(rows, "valid_rollouts"),
            "rollouts": total(rows, "rollouts"),
            "response_tokens": total(rows, "response_tokens"),
        },
        "largest_grad_norm": {role: largest(rows, f"{role}_grad_norm") for role in ROLES},
    }
