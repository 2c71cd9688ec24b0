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

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.data.admission import Checks, admitted, prompt_of
from prism_megatron.data.identity import Identity, identity_of
from prism_megatron.data.reading.fields import check_text, check_texts, image_path, lines_of, object_of
from prism_megatron.data.reading.intake import HELD_OUT, LONG_RESPONSE, Sieve, TextError
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

    @property
    def question_text(self) -> str:
        """As it is asked."""
        return self.question


def read_pairs(path: Path, *, sieve: Sieve | None = None) -> tuple[PairLine, ...]:
    """Read and check a whole file. Raises DataError, or leaves it to ``sieve``, as ``records.read_records``."""
    path = path.resolve()
    if not path.is_file():
        raise DataError(f"{path} is no file; --pairs names a file of preference pairs, a JSON object to a line")
    refuse_evaluation_folder(path.parent)
    pairs = []
    lines = list(lines_of(path))
    for where, line in lines:
        with nullcontext() if sieve is None else sieve.catching():
            pairs.append(_line(line, path.parent, where))
    if not lines:
        raise DataError(f"{path} holds no pairs")
    if sieve is not None:
        sieve.lines = len(lines)
    return tuple(pairs)


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
        checks: Checks = Checks(),  # noqa: B008  # frozen
    ) -> None:
        """Checks and tokenises every line. Raises DataError as ``loader.RecordSource``."""
        self._renderer = renderer
        self._seed = seed
        self._batch_size = batch_size
        self._checks, self._max_prompt_tokens = checks, max_prompt_tokens
        sieve = Sieve(path, max_prompt_tokens=max_prompt_tokens, max_response_tokens=max_response_tokens, part=part)
        responses: dict[str, tuple[Response, tuple[Response, ...]]] = {}
        asked: list[PairLine] = []
        long_responses = 0
        for line in read_pairs(path, sieve=sieve):
            with sieve.catching():
                if not in_part(line, part, validation_share=validation_share):
                    sieve.leave_out(HELD_OUT)
                    continue
                renderer.refuse_added_tokens(f"{line.where}: field question", line.question)
                chosen, rejected = _responses(line, renderer)
                fitting = tuple(one for one in rejected if len(one.token_ids) <= max_response_tokens)
                if len(chosen.token_ids) > max_response_tokens or not fitting:
                    sieve.leave_out(LONG_RESPONSE)
                else:
                    long_responses += len(rejected) - len(fitting)
                    responses[line.where] = chosen, fitting
                    asked.append(line)
        kept = admitted(asked, sieve, renderer, checks, max_prompt_tokens=max_prompt_tokens)
        self._usable = [(line, *responses[line.where]) for line in kept]
        pairs = sum(len(rejected) for _, _, rejected in self._usable)
        self.counts = sieve.counts(
            len(kept), checks.on_bad, offer=checks.offer, pairs=pairs, long_rejected_responses=long_responses
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
        prompt = prompt_of(line, self._renderer, self._checks, max_prompt_tokens=self._max_prompt_tokens)
        return PreferenceGroup(prompt=prompt, reference=chosen, rollouts=rejected)


def _line(line: bytes, folder: Path, where: str) -> PairLine:
    fields = object_of(line, KEYS, where)
    for key in REQUIRED_TEXT:
        check_text(fields[key], key, where)
    check_texts(fields["rejected"], "rejected", where, least=1, wanted="a list of at least one response")
    refuse_evaluation_source(fields["source"], where)
    return PairLine(
        where=where,
        id=fields["id"],
        image=image_path(fields["image"], folder, where),
        question=fields["question"],
        chosen=fields["chosen"],
        rejected=tuple(fields["rejected"]),
        source=fields["source"],
    )


def _responses(line: PairLine, renderer: Renderer) -> tuple[Response, tuple[Response, ...]]:
    """The line's responses in tokens. Raises DataError for one that is invalid, or lacks what the chosen one has."""
    chosen = renderer.written(line.chosen, id=f"{line.where}: field chosen")
    where = f"{line.where}: field rejected"
    rejected = tuple(renderer.written(text, id=where) for text in line.rejected)
    if chosen.segments.reasoning is not None and any(one.segments.reasoning is None for one in rejected):
        raise TextError(f"{where}: a caption alone, where the chosen response has reasoning too; give whole responses")
    return chosen, rejected
