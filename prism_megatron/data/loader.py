"""What a stage trains on, step by step.

``batch(step)`` is a pure function of the step: a resumed run, and every rank, sees the same examples without any
saved loader state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.data.admission import Checks, admitted, prompt_of
from prism_megatron.data.identity import Identity, identity_of
from prism_megatron.data.reading.intake import (
    HELD_OUT,
    LONG_RESPONSE,
    NO_CAPTION,
    NOT_CHECKABLE,
    NOT_SELECTED,
    Counts,
    Sieve,
)
from prism_megatron.data.records import Part, Record, in_part, read_records
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import Scene, Split, keyed_generator, make_scene
from prism_megatron.data.selection import Selection
from prism_megatron.data.teachers import Teacher, write
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

    @property
    def counts(self) -> Counts | None:
        """What became of the lines that they were read from; None for examples that are made."""

    def batch(self, step: int) -> list[Example]:
        """The examples of step 0, 1, 2, …; always equally many."""


class SceneSource:
    """An endless stream of scenes that never repeats; step s shows scenes s·batch_size to (s+1)·batch_size - 1."""

    counts = None

    def __init__(
        self,
        renderer: Renderer,
        *,
        split: Split,
        seed: int,
        batch_size: int,
        teacher: Teacher = "faithful",
        faithful_share: float = 0.0,
        world: MiniWorld = "habits",
    ) -> None:
        self._renderer = renderer
        self._world: MiniWorld = world
        self._split: Split = split
        self._seed = seed
        self._batch_size = batch_size
        self._teacher: Teacher = teacher
        self._faithful_share = faithful_share

    @property
    def identity(self) -> Identity:
        """Scenes are made from their number: the split stands for them all."""
        world = "" if self._world == "habits" else f" of {self._world}"
        text = f"scenes{world} of {self._split} by {self._teacher}"
        return identity_of("data", [(text, ())], batch_size=self._batch_size)

    def batch(self, step: int) -> list[Example]:
        return [self.example(step * self._batch_size + i) for i in range(self._batch_size)]

    def example(self, index: int) -> Example:
        """Scene ``index`` of the split, written about by this source's teacher."""
        scene = make_scene(self._split, seed=self._seed, index=index, world=self._world)
        writing = write(scene, self._teacher, faithful_share=self._faithful_share, seed=self._seed)
        return Example(
            prompt=self._renderer.prompt(scene.id, scene.question.text, [scene.image()]),
            reference=self._renderer.response(*writing, id=scene.id),
            scene=scene,
        )


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
        answers_alone: bool = False,
        checkable: Callable[[Record], bool] | None = None,
        selection: Selection | None = None,
        checks: Checks = Checks(),  # noqa: B008  # frozen
    ) -> None:
        """Checks every record, and measures every prompt and reference.

        ``answers_alone``: a record need not have a caption, and its reference is its answer, whatever else it has; of
        these only ``checkable`` ones are used, where that is asked for. With a ``selection`` its records alone are.

        Raises DataError, naming the first of them, for bad records unless ``checks`` skip them, if none is left, and
        for a selection of other records.
        """
        self._renderer = renderer
        self._seed = seed
        self._batch_size = batch_size
        self._checks, self._max_prompt_tokens = checks, max_prompt_tokens
        sieve = Sieve(
            folder / "data.jsonl",
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            part=part,
        )
        references: dict[str, Response] = {}
        asked: list[Record] = []
        of_part: list[Record] = []
        for record in read_records(folder, purpose="train", sieve=sieve):
            with sieve.catching():
                if not in_part(record, part, validation_share=validation_share):
                    sieve.leave_out(HELD_OUT)
                    continue
                of_part.append(record)
                if selection is not None and record not in selection:
                    sieve.leave_out(NOT_SELECTED)
                elif checkable is not None and not checkable(record):
                    sieve.leave_out(NOT_CHECKABLE)
                elif answers_alone:
                    references[record.id] = answer_alone(record, renderer)
                    asked.append(record)
                elif (reference := reference_of(record, renderer)) is None:
                    sieve.leave_out(NO_CAPTION)
                elif len(reference.token_ids) > max_response_tokens:
                    sieve.leave_out(LONG_RESPONSE)
                else:
                    references[record.id] = reference
                    asked.append(record)
        if selection is not None:
            selection.check(of_part, folder / "data.jsonl")
        kept = admitted(asked, sieve, renderer, checks, max_prompt_tokens=max_prompt_tokens)
        self._usable = [(record, references[record.id]) for record in kept]
        captions = [] if answers_alone else [reference for _, reference in self._usable]
        without_reasoning = sum(reference.segments.reasoning is None for reference in captions)
        self.counts = sieve.counts(len(kept), checks.on_bad, offer=checks.offer, without_reasoning=without_reasoning)

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
        return self.in_order(int(order[offset]))

    @property
    def records(self) -> list[Record]:
        """Those that are used, in the order of their file."""
        return [record for record, _ in self._usable]

    def in_order(self, index: int) -> Example:
        """The example of number ``index`` of ``records``."""
        record, reference = self._usable[index]
        prompt = prompt_of(record, self._renderer, self._checks, max_prompt_tokens=self._max_prompt_tokens)
        return Example(prompt=prompt, reference=reference, record=record)


def reference_of(record: Record, renderer: Renderer) -> Response | None:
    """What the record's rollouts are compared with: a whole response, a caption alone, or None without a caption.

    Raises TextError, naming the line, for text that makes no valid response, or that the tokenizer would take for
    tokens: the question's too, and the answer's where nothing else asks for it.
    """
    where = _refuse_added_tokens(record, renderer)
    if record.caption is None:
        return None
    if record.solution is None:
        return renderer.caption_alone(record.caption, id=where)
    return renderer.response(record.caption, record.solution, record.answer, id=where)


def answer_alone(record: Record, renderer: Renderer) -> Response:
    """The record's answer, which rollouts are checked against. Raises as ``reference_of``."""
    return renderer.answer_alone(record.answer, id=_refuse_added_tokens(record, renderer))


def _refuse_added_tokens(record: Record, renderer: Renderer) -> str:
    """Where the record is. Raises TextError for question, choices or answer with the tokenizer's own tokens in it."""
    where = record.where or record.id
    for key, text in (("question", record.question), ("answer", record.answer)):
        renderer.refuse_added_tokens(f"{where}: field {key}", text)
    for choice in record.choices or ():
        renderer.refuse_added_tokens(f"{where}: field choices", choice)
    return where
