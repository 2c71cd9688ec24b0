"""A user's reward that some records never differ by."""

from prism_megatron.rewards.user import RewardInput


def by_record(sample: RewardInput) -> float:
    """Answers to records of an even number differ, those of the others never do."""
    number = int("".join(filter(str.isdigit, sample.id)) or 0)
    return float(len(sample.response) % 7) if number % 2 == 0 else 1.0


def never(_sample: RewardInput) -> float:
    """No answer is better than another."""
    return 1.0


def by_length(sample: RewardInput) -> float:
    """About half of the answers to a record of an even number are right, and all of the others'."""
    number = int("".join(filter(str.isdigit, sample.id)) or 0)
    return float(number % 2 or sum(sample.response.encode()) % 2)
