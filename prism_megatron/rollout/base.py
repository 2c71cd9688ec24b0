"""What a stage asks of a rollout engine. Implementations: ``embedded`` (in process), ``sglang`` (servers)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from prism_megatron.errors import ConfigError
from prism_megatron.types import Prompt, Rollout, Segments

if TYPE_CHECKING:
    from torch import Tensor

    from prism_megatron.conversion.expert_layout import ExpertLayout


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    At ``temperature`` 0 the most likely token is taken and the reported log-probs are those at temperature 1.
    """

    temperature: float = 1.0
    """divides the logits before the softmax; 0 is greedy"""
    top_p: float = 1.0
    """draw only from the fewest most likely tokens whose probabilities reach this sum"""
    max_new_tokens: int = 128
    """a response that has not ended by then is cut there, with finish reason ``length``"""

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ConfigError(f"sampling temperature {self.temperature} is negative; use 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p {self.top_p} is outside (0, 1]; 1 turns it off")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens} leaves no room for an answer; use 1 or more")


Finished = Callable[[int, tuple[Rollout, ...]], None]
"""Takes the place of a prompt in a request and its samples."""


@dataclass(frozen=True)
class SampleRequest:
    """Responses to draw: ``n`` for each prompt, or of each the ``samples`` with these numbers.

    Draws are keyed by (seed, step, number of the prompt, number of the sample, position), where the first prompt has
    number ``prompt_offset``: a rank that holds a slice of the step's prompts passes the slice's start.
    Example: ``SampleRequest(prompts, 16, Sampling(max_new_tokens=96), seed=42, step=7)``.
    """

    prompts: Sequence[Prompt]
    n: int
    sampling: Sampling
    seed: int = field(kw_only=True)
    step: int = field(kw_only=True)
    prompt_offset: int = field(default=0, kw_only=True)
    samples: Sequence[range] | None = field(default=None, kw_only=True)
    finished: Finished | None = field(default=None, kw_only=True)
    """told of every prompt once, as soon as its samples are there, and from any thread; others may still be sampled"""

    @property
    def wanted(self) -> Sequence[range]:
        """Numbers of the samples of each prompt."""
        return [range(self.n)] * len(self.prompts) if self.samples is None else self.samples


class Watch(Protocol):
    """Follows one response while it is sampled."""

    def add(self, token_id: int) -> bool:
        """Take the next token; True where sampling on would be in vain."""


class SegmentFinder(Protocol):
    """Finds the judged parts of a response in its tokens."""

    def find(self, token_ids: Sequence[int]) -> Segments:
        """Spans in positions of ``token_ids``, or what makes the response invalid. Never raises."""

    def watch(self) -> Watch:
        """A fresh watch for one response."""


class RolloutEngine(Protocol):
    """Samples responses from the newest policy it was given."""

    @property
    def policy_version(self) -> int | None:
        """Version of the weights in use; None until a first complete update."""

    @property
    def expert_layout(self) -> ExpertLayout:
        """How ``update_weights`` takes the experts of a policy that has them; the same on every rank."""

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take every weight of the policy, under its Hugging Face name.

        Raises WeightSyncError unless names and shapes are exactly the model's. ``policy_version`` then says what is
        held: the weights before, or none, and generating is refused until an update succeeds.
        """

    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Draw what is asked for, in the order of the prompts. Servers draw from generators of their own."""

    def sleep(self) -> None:
        """Release memory that the trainer could use, where the engine takes it from the trainer's devices.

        All samples must have been drawn. Every rank calls it; ``wake`` precedes the next draw, and follows an
        ``update_weights`` where there is one.
        """

    def wake(self) -> None:
        """Make sure that samples can be drawn again, with the newest weights. Every rank calls it."""

    def close(self) -> None:
        """Release the engine's memory; it cannot be used afterwards. May be called again."""
