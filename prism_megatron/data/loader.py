"""What a stage trains on, step by step.

``batch(step)`` is a pure function of the step: a resumed run, and every rank, sees the same examples without any
saved loader state.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prism_megatron.data.identity import Identity, identity_of
from prism_megatron.data.images import image_size, open_image
from prism_megatron.data.records import Part, Record, in_part, read_records
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import Scene, Split, keyed_generator, make_scene
from prism_megatron.data.teachers import Teacher, write
from prism_megatron.errors import DataError
from prism_megatron.types import Prompt, Response


@dataclass(frozen=True)
class Example:
    """One question with its reference, and where it comes from: exactly one of ``scene`` and ``record``."""

    prompt: Prompt
    reference: Response
    scene: Scene | None = None
    record: Record | None = None


class ExampleSource(Protocol):
    """Anything a stage can draw batches from."""

    @property
    def identity(self) -> Identity:
        """Which examples, in which order, how many at a time."""

    def batch(self, step: int) -> list[Example]:
        """The examples of step 0, 1, 2, …; always equally many."""


class SceneSource:
    """An endless stream of scenes that never repeats; step s shows scenes s·batch_size to (s+1)·batch_size - 1."""

    def __init__(
        self,
        renderer: Renderer,
        *,
        split: Split,
        seed: int,
        batch_size: int,
        teacher: Teacher = "faithful",
        faithful_share: float = 0.0,
    ) -> None:
        self._renderer = renderer
        self._split: Split = split
        self._seed = seed
        self._batch_size = batch_size
        self._teacher: Teacher = teacher
        self._faithful_share = faithful_share

    @property
    def identity(self) -> Identity:
        """Scenes are made from their number: the split stands for them all."""
        return identity_of("data", [(f"scenes of {self._split} by {self._teacher}", ())], batch_size=self._batch_size)

    def batch(self, step: int) -> list[Example]:
        return [self.example(step * self._batch_size + i) for i in range(self._batch_size)]

    def example(self, index: int) -> Example:
        """Scene ``index`` of the split, written about by this source's teacher."""
        scene = make_scene(self._split, seed=self._seed, index=index)
        writing = write(scene, self._teacher, faithful_share=self._faithful_share, seed=self._seed)
        return Example(
            prompt=self._renderer.prompt(scene.id, scene.question.text, [scene.image()]),
            reference=self._renderer.response(*writing, id=scene.id),
            scene=scene,
        )


@dataclass(frozen=True)
class RecordCounts:
    """How many records of the part are used, how many of those for perception alone, and why others are not."""

    kept: int
    without_reasoning: int
    without_reference: int
    long_prompt: int
    long_response: int


class RecordSource:
    """The records of one part of a set, in a new order every epoch. Images are read when their batch is."""

    def __init__(
        self,
        folder: Path,
        renderer: Renderer,
        *,
        part: Part,
        seed: int,
        batch_size: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        validation_share: float = 0.1,
    ) -> None:
        """Checks every record, and measures every prompt and reference; raises DataError if none can be used."""
        self._renderer = renderer
        self._seed = seed
        self._batch_size = batch_size
        self._usable: list[tuple[Record, Response]] = []
        without_reasoning = without_reference = long_prompt = long_response = 0
        for record in read_records(folder, purpose="train"):
            if not in_part(record, part, validation_share=validation_share):
                continue
            reference = reference_of(record, renderer)
            if reference is None:
                without_reference += 1
                continue
            prompt_tokens = renderer.num_prompt_tokens(record.id, record.question_text, [image_size(record.image)])
            if prompt_tokens > max_prompt_tokens:
                long_prompt += 1
            elif len(reference.token_ids) > max_response_tokens:
                long_response += 1
            else:
                self._usable.append((record, reference))
                without_reasoning += reference.segments.reasoning is None
        self.counts = RecordCounts(len(self._usable), without_reasoning, without_reference, long_prompt, long_response)
        if not self._usable:
            raise DataError(
                f"{folder}: no record of the {part} part can be used: "
                f"{without_reference} lack a caption, "
                f"{long_prompt} prompts exceed {max_prompt_tokens} tokens, "
                f"{long_response} references exceed {max_response_tokens} tokens"
            )

    @property
    def identity(self) -> Identity:
        parts = ((f"{one.id}\n{one.question_text}", reference.token_ids) for one, reference in self._usable)
        return identity_of("data", parts, batch_size=self._batch_size)

    def batch(self, step: int) -> list[Example]:
        return [self.example(step * self._batch_size + i) for i in range(self._batch_size)]

    def example(self, position: int) -> Example:
        """Example number ``position`` of the endless sequence of shuffled epochs."""
        epoch, offset = divmod(position, len(self._usable))
        order = keyed_generator("epoch", self._seed, epoch).permutation(len(self._usable))
        record, reference = self._usable[int(order[offset])]
        prompt = self._renderer.prompt(record.id, record.question_text, [open_image(record.image)])
        return Example(prompt=prompt, reference=reference, record=record)


def reference_of(record: Record, renderer: Renderer) -> Response | None:
    """What the record's rollouts are compared with: a whole response, a caption alone, or None without a caption.

    Raises DataError, naming the record, for text that makes no valid response.
    """
    if record.caption is None:
        return None
    if record.solution is None:
        return renderer.caption_alone(record.caption, id=record.id)
    return renderer.response(record.caption, record.solution, record.answer, id=record.id)
