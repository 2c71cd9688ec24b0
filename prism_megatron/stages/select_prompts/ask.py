"""All prompts are answered, a batch after the other, and each batch's pass rates are kept before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from prism_megatron.data.loader import Example
from prism_megatron.errors import RunStopped
from prism_megatron.parallel.collectives import on_main
from prism_megatron.run.session import Session
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.stages.select_prompts.pass_rates import PassRate, PassRateFile, pass_rate_of


@dataclass(frozen=True)
class Batches:
    """Prompts in the order of their file. Draws are keyed by the batch: one that is asked again is answered alike."""

    example: Callable[[int], Example]
    """by number, read when its batch is"""
    total: int
    size: int

    @property
    def count(self) -> int:
        """How many there are."""
        return -(-self.total // self.size)

    def batch(self, number: int) -> Sequence[Example]:
        """The prompts of batch 0, 1, 2, …; the last one may have fewer."""
        return [self.example(i) for i in range(number * self.size, min(self.total, (number + 1) * self.size))]


def ask_all(
    batches: Batches, queue: RolloutQueue, file: PassRateFile, session: Session, *, done: int
) -> list[PassRate]:
    """The pass rates of all prompts but the first ``done``, which whole batches have; all ranks call it together.

    Raises RunStopped after a whole batch where somebody asked for an end, and as ``RolloutQueue.take``.
    """
    rates: list[PassRate] = []
    for number in range(done // batches.size, batches.count):
        if (wish := session.stopping.agreed()) is not None:
            raise RunStopped(
                f"stopped by {wish} after {done + len(rates)} of {batches.total} prompts; the same command with "
                f"--output {session.output} goes on"
            )
        with session.activity.phase("rollout"):
            step = queue.take(number)
        new = [pass_rate_of(group, rewards) for group, rewards in zip(step.groups, step.rewards, strict=True)]
        on_main(partial(file.append, new))
        rates += new
        right = sum(rate.passes for rate in new) / sum(rate.rollouts for rate in new)
        session.say(f"{done + len(rates)} of {batches.total} prompts; {right:.3f} of the last answers are right")
    return rates
