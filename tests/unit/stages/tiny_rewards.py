"""Answers with rewards that are known by hand, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prism_megatron.data.loader import Example
from prism_megatron.data.records import Record
from prism_megatron.rewards.format import ReadResponse
from prism_megatron.rewards.presets import PRESETS, combine
from prism_megatron.rewards.rewarder import Rewarded
from prism_megatron.rewards.verdict import Verdict
from prism_megatron.stages.rlvr.prospect import RewardedGroup
from prism_megatron.types import Prompt, Response, Rollout, RolloutGroup, Segments, VersionSpan

NOT_JUDGED = Segments(None, None, "not judged")


def example(name: str) -> Example:
    record = Record(name, Path("x"), "How many?", None, "3", None, None, "made", "integer")
    return Example(Prompt(name, (5, 6), (), "How many?"), Response((7,), NOT_JUDGED), record=record)


def rollout(tokens: int = 3, *, version: int = 0) -> Rollout:
    return Rollout(
        tuple(range(10, 10 + tokens)), (-0.5,) * tokens, "stop", (VersionSpan(version, 0, tokens),), NOT_JUDGED
    )


def rewarded(right: bool, *, valid: bool = True, reason: str = "") -> Rewarded:
    """With PRISM's preset: 1, 0.2, or 0 for another form."""
    reward = combine(PRESETS["prism"], name="accuracy", answer=float(right), valid=valid)
    return Rewarded(reward, ReadResponse(valid, "3" if right else "4"), Verdict(right, "number", 0.01, reason))


def group(rights: Sequence[bool], *, name: str = "q", lengths: Sequence[int] = ()) -> RewardedGroup:
    """Valid answers of three tokens, or of ``lengths``, some of which are right."""
    rollouts = tuple(rollout(length) for length in (lengths or [3] * len(rights)))
    one = example(name)
    return RewardedGroup(one, RolloutGroup(one.prompt, one.reference, rollouts), [rewarded(right) for right in rights])
