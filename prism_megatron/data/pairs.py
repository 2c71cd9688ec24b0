"""Preference pairs as JSON lines: what a warm-start reads instead of sampling, and what it can write of its samples.

Every line has the six fields of ``KEYS``. ``image`` is a path below the file's folder. ``chosen`` is a response with
its tags, ``<caption>…</caption> <think>…</think> <answer>…</answer>``, or its caption part alone, which then judges
perception only; ``rejected`` lists one or more responses with at least the same parts. ``question`` is asked as it
stands, ``source`` says where the line comes from. Lines with one ``id`` share a prompt and are held out together.

Example::

    {"id": "scene-7", "image": "images/7.png", "question": "How many red circles are there?", "source": "mine",
     "chosen": "<caption>\\n- red circle: 2\\n</caption>\\n<think>\\nred circle: 2\\n</think>\\n<answer>2</answer>",
     "rejected": ["<caption>\\n- red circle: 1\\n</caption>\\n<think>\\nred circle: 1\\n</think>\\n<answer>1</answer>"]}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.data.fields import check_text, image_path, lines_of, object_of
from prism_megatron.data.identity import Identity, identity_of
from prism_megatron.data.images import image_size, open_image
from prism_megatron.data.records import Part, in_part, refuse_evaluation_folder, refuse_evaluation_source
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import keyed_generator
from prism_megatron.errors import DataError
from prism_megatron.types import PreferenceGroup, Response

KEYS = ("id", "image", "question", "chosen", "rejected", "source")
REQUIRED_TEXT = ("id", "image", "question", "chosen", "source")
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class PairLine:
    """One line whose fields are well formed; ``where`` is its file and number."""

    where: str
    id: str
    image: Path
    question: str
    chosen: str
    rejected: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class PairCounts:
    """Lines of the part that are used, their pairs, and the lines and responses that are too long."""

    lines: int
    pairs: int
    long_prompts: int
    long_responses: int


def read_pairs(path: Path) -> tuple[PairLine, ...]:
    """Read and check a whole file. Raises DataError as ``records.read_records``."""
    path = path.resolve()
    if not path.is_file():
        raise DataError(f"{path} is no file; --pairs names a file of preference pairs, a JSON object to a line")
    refuse_evaluation_folder(path.parent)
    lines = tuple(_line(line, path.parent, where) for where, line in lines_of(path))
    if not lines:
        raise DataError(f"{path} holds no pairs")
    return lines


class PairSource:
    """The pairs of one part of a file, in a new order every epoch. Images are read when their batch is."""

    def __init__(
        self,
        path: Path,
        renderer: Renderer,
        *,
        part: Part,
        seed: int,
        batch_size: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        validation_share: float = VALIDATION_SHARE,
    ) -> None:
        """Checks and tokenises every line; raises DataError, naming the line, or if none of the part can be used."""
        self._renderer = renderer
        self._seed = seed
        self._batch_size = batch_size
        self._usable: list[tuple[PairLine, Response, tuple[Response, ...]]] = []
        long_prompts = long_responses = 0
        for line in read_pairs(path):
            if not in_part(line, part, validation_share=validation_share):
                continue
            chosen, rejected = _responses(line, renderer)
            fitting = tuple(one for one in rejected if len(one.token_ids) <= max_response_tokens)
            question = f"{line.where}: field question"
            if renderer.num_prompt_tokens(question, line.question, [image_size(line.image)]) > max_prompt_tokens:
                long_prompts += 1
            elif len(chosen.token_ids) > max_response_tokens or not fitting:
                long_responses += 1 + len(rejected)
            else:
                long_responses += len(rejected) - len(fitting)
                self._usable.append((line, chosen, fitting))
        pairs = sum(len(rejected) for _, _, rejected in self._usable)
        self.counts = PairCounts(len(self._usable), pairs, long_prompts, long_responses)
        if not self._usable:
            raise DataError(
                f"{path}: no line of the {part} part can be used: {long_prompts} prompts exceed {max_prompt_tokens} "
                f"tokens, {long_responses} responses exceed {max_response_tokens} tokens"
            )

    @property
    def identity(self) -> Identity:
        """Which lines, in which order, how many at a time."""
        parts = (
            (f"{line.id}\n{line.question}", [*chosen.token_ids, *(i for one in rejected for i in one.token_ids)])
            for line, chosen, rejected in self._usable
        )
        return identity_of("pairs", parts, batch_size=self._batch_size)

    def batch(self, step: int) -> list[PreferenceGroup]:
        """The lines of step 0, 1, 2, …; always equally many."""
        return [self.group(step * self._batch_size + i) for i in range(self._batch_size)]

    def group(self, position: int) -> PreferenceGroup:
        """Line number ``position`` of the endless sequence of shuffled epochs."""
        epoch, offset = divmod(position, len(self._usable))
        order = keyed_generator("epoch", self._seed, epoch).permutation(len(self._usable))
        line, chosen, rejected = self._usable[int(order[offset])]
        prompt = self._renderer.prompt(line.id, line.question, [open_image(line.image)])
        return PreferenceGroup(prompt=prompt, reference=chosen, rollouts=rejected)


def _line(line: bytes, folder: Path, where: str) -> PairLine:
    fields = object_of(line, KEYS, where)
    for key in REQUIRED_TEXT:
        check_text(fields[key], key, where)
    rejected: Any = fields["rejected"]
    if not isinstance(rejected, list) or not rejected:
        raise DataError(f"{where}: field rejected: a list of at least one response expected")
    for response in rejected:
        check_text(response, "rejected", where)
    refuse_evaluation_source(fields["source"], where)
    return PairLine(
        where=where,
        id=fields["id"],
        image=image_path(fields["image"], folder, where),
        question=fields["question"],
        chosen=fields["chosen"],
        rejected=tuple(rejected),
        source=fields["source"],
    )


def _responses(line: PairLine, renderer: Renderer) -> tuple[Response, tuple[Response, ...]]:
    """The line's responses in tokens. Raises DataError for one that is invalid, or lacks what the chosen one has."""
    chosen = renderer.written(line.chosen, id=f"{line.where}: field chosen")
    where = f"{line.where}: field rejected"
    rejected = tuple(renderer.written(text, id=where) for text in line.rejected)
    if chosen.segments.reasoning is not None and any(one.segments.reasoning is None for one in rejected):
        raise DataError(f"{where}: a caption alone, where the chosen response has reasoning too; give whole responses")
    return chosen, rejected
