"""The vocabulary of the project as frozen types.

Shape suffixes: P patches, D pixels per patch (3 · temporal_patch · patch · patch), S tokens, B rows, V vocabulary.

Example: one prompt, its reference and two rollouts::

    prompt = Prompt(id="scene-7", token_ids=(1, 9, 9, 4), images=(image,), question="How many red circles?")
    reference = Response(token_ids=(31, 32, 2), segments=Segments(Span(0, 1), Span(1, 3), None))
    group = RolloutGroup(prompt=prompt, reference=reference, rollouts=(rollout_a, rollout_b))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from prism_megatron.config.stages.discriminator import SEGMENTS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PERCEPTION, REASONING = TOWERS = (0, 1)
"""Numbers of the discriminator's towers."""
TOWER_NAMES = SEGMENTS
"""Their names by number, as metrics have them: a tower is called after the segment that it judges."""

FinishReason = Literal["stop", "length"]


class Span(NamedTuple):
    """Half-open range of token positions ``[start, end)`` inside a response."""

    start: int
    end: int


class VersionSpan(NamedTuple):
    """Tokens ``[start, end)`` of a response were drawn with ``version`` of the policy."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Segments:
    """Where the two judged parts of a response lie, in token positions of the response.

    ``problem`` is None for a valid response; otherwise it says why it is not, and both spans are None.
    ``perception`` covers the caption with its tags, ``reasoning`` covers think and answer with their tags. A reference
    that is a caption alone is valid and has no ``reasoning``; a valid rollout always has both.
    """

    perception: Span | None
    reasoning: Span | None
    problem: str | None

    @property
    def valid(self) -> bool:
        return self.problem is None

    def of_tower(self, tower: int) -> Span | None:
        """What the discriminator's tower 0 (perception) or 1 (reasoning) judges."""
        return (self.perception, self.reasoning)[tower]


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One preprocessed image. Two sequences share its features exactly when they hold the same object."""

    pixel_values_P_D: npt.NDArray[np.float32]
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True)
class TokenSequence:
    """One row for the model: token ids with image pads already expanded, and the images in order."""

    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A rendered question: chat template applied, image pads expanded, generation prompt appended."""

    id: str
    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    question: str


@dataclass(frozen=True)
class Response:
    """A tokenised reference answer, ending in the same end token that a finished rollout ends in."""

    token_ids: tuple[int, ...]
    segments: Segments


@dataclass(frozen=True)
class Rollout:
    """One sampled answer. ``logprobs`` are under the sampling temperature, one per token of ``token_ids``.

    ``versions`` cover the tokens in order: one span, or several where the policy was updated while it answered. Each
    log-prob is that of its token's version, given all tokens before it. Example: ``Rollout((31, 9, 32, 2), (-0.1, -2.0,
    -0.3, 0.0), "stop", (VersionSpan(4, 0, 4),), segments)``, four tokens that version 4 drew, ended by the end token 2.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    segments: Segments

    @property
    def policy_version(self) -> int:
        """Version of the oldest policy that drew one of the tokens."""
        return min(span.version for span in self.versions)

    def token_versions(self) -> list[int]:
        """The version that drew each token."""
        return [span.version for span in self.versions for _ in range(span.start, span.end)]


@dataclass(frozen=True)
class PreferenceGroup:
    """One prompt with the reference that should score above every one of its answers."""

    prompt: Prompt
    reference: Response
    rollouts: tuple[Response | Rollout, ...]

    @property
    def towers(self) -> tuple[int, ...]:
        """Towers that judge this group: those whose segment the reference has."""
        return tuple(tower for tower in TOWERS if self.reference.segments.of_tower(tower) is not None)

    @property
    def valid_rollouts(self) -> tuple[int, ...]:
        """Numbers of the rollouts with every segment that the reference has; each makes one pair in every tower."""
        return tuple(
            r
            for r, rollout in enumerate(self.rollouts)
            if rollout.segments.valid and all(rollout.segments.of_tower(tower) is not None for tower in self.towers)
        )


@dataclass(frozen=True)
class RolloutGroup(PreferenceGroup):
    """All rollouts of one prompt beside its one reference."""

    rollouts: tuple[Rollout, ...]
