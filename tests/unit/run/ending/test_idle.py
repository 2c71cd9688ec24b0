"""Counting steps that taught nothing, role by role."""

from __future__ import annotations

from prism_megatron.run.ending.idle import Idleness


def test_roles_are_counted_apart_and_those_that_rest_are_left_alone() -> None:
    """Claim: a role in neither list neither learned nor failed to: its count stays as it is."""
    own = Idleness(3)
    own.see((), {"policy": "a"})
    own.see((), {"policy": "b", "discriminator": "c"})
    own.see(("discriminator",), {})
    assert own.verdict is None
    own.see((), {"policy": "d"})
    assert own.verdict == "the policy learned nothing in the last 3 steps (--max-idle-steps): d"
    assert own.never_trained == {"policy": "d"}
    own.see(("policy",), {})
    assert own.verdict is None and own.never_trained == {}


def test_warnings_grow_rare() -> None:
    own = Idleness(0)
    warned = [step for step in range(1, 41) if own.see((), {"policy": "why"})]
    assert warned == [1, 2, 3, 4, 8, 16, 32]
    own.see(("policy",), {})
    assert own.see((), {"policy": "why"}) == ["WARNING: the policy learned nothing in this step: why"]


def test_no_limit_ends_nothing() -> None:
    own = Idleness(0)
    for _ in range(100):
        own.see((), {"policy": "why"})
    assert own.verdict is None


def test_roles_with_one_reason_share_a_line() -> None:
    own = Idleness(0)
    assert own.see((), {"policy": "why", "discriminator": "why"}) == [
        "WARNING: the policy and the discriminator learned nothing in this step: why"
    ]
    assert len(own.see((), {"policy": "why", "discriminator": "else"})) == 2


def test_what_was_counted_goes_on_after_a_resume() -> None:
    own, later = Idleness(3), Idleness(3)
    own.see(("discriminator",), {"policy": "a"})
    own.see((), {"policy": "b"})
    later.restore(own.to_plain())
    later.see((), {"policy": "c", "discriminator": "d"})
    assert later.verdict is not None and "the last 3 steps" in later.verdict
    assert later.never_trained == {"policy": "c"}
    later.restore({})
    assert later.verdict is None and later.never_trained == {}
