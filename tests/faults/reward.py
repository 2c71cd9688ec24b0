"""The reward of trials, from a user's function: answers of one prompt differ by it."""

from prism_megatron.rewards.user import RewardInput


def by_text(sample: RewardInput) -> float:
    """A figure that hangs on every byte of the answer."""
    return float(sum(sample.response.encode()) % 7)
