"""The AUC within groups, by hand."""

from __future__ import annotations

from prism_megatron.evaluation.auc import AUC, within_group_auc


def test_pairs_are_pooled_within_groups_and_a_tie_is_half_a_win() -> None:
    """Two right beside two wrong: two wins, a tie, a loss; one pair more in a group whose scores are all higher."""
    one = [(2.0, True), (1.0, True), (1.0, False), (1.5, False)]
    other = [(9.0, False), (8.0, True)]
    assert within_group_auc([one, other]) == AUC(2.5 / 5, 5)
    assert within_group_auc([one]) == AUC(2.5 / 4, 4)


def test_groups_of_one_kind_have_no_pairs() -> None:
    assert within_group_auc([[(1.0, True), (2.0, True)], [(0.0, False)], []]) == AUC(None, 0)
