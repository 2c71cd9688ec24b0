"""Has the answers to an example checked against what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.rewards.rewarder import Rewarded, Rewarder, Sampled
from prism_megatron.types import Rollout


def gold_of(example: Example) -> tuple[str, str | None]:
    """What the answer has to be, and its kind, where the example says it."""
    if example.scene is not None:
        return example.scene.answer, None
    assert example.record is not None, "an example comes from a scene or from a record"
    return example.record.answer, example.record.answer_type


def reward(
    rewarder: Rewarder, renderer: Renderer, example: Example, rollouts: Sequence[Rollout]
) -> Future[list[Rewarded]]:
    """Begin to reward answers to ``example``; may be called from any thread."""
    gold, answer_type = gold_of(example)
    end = renderer.end_token_id
    return rewarder.submit(
        [
            Sampled(
                example.prompt.id,
                example.prompt.question,
                gold,
                renderer.decode(rollout.token_ids[:-1] if rollout.token_ids[-1] == end else rollout.token_ids),
                ended=rollout.token_ids[-1] == end,
                answer_type=answer_type,
            )
            for rollout in rollouts
        ]
    )
