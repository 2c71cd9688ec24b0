"""Which questions are shown with their image and without it, and which responses to them are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from prism_megatron.config.tools.drift import file_of
from prism_megatron.config.tools.visual_reliance import VisualRelianceConfig
from prism_megatron.data.admission import Checks, prompt_of
from prism_megatron.data.loader import SceneSource, reference_of
from prism_megatron.data.pairs import VALIDATION_SHARE
from prism_megatron.data.reading.intake import TextError
from prism_megatron.data.records import in_part, read_records
from prism_megatron.data.render import Renderer
from prism_megatron.errors import DataError
from prism_megatron.evaluation.drift.responses import read_responses
from prism_megatron.training.visual_reliance import Asked
from prism_megatron.types import Prompt, Response

NO_RESPONSE = "no response, or no caption in the reference"
NOT_IN_FORM = "not in the asked form"
LONG_RESPONSE, LONG_PROMPT = "response too long", "question too long"
_CHECKS, _ANY = Checks(has_flags=False), 2**31
T = TypeVar("T")


class _Question(NamedTuple):
    """One question: its id, and what makes its reference and its prompt when they are wanted."""

    id: str
    reference: Callable[[], Response | None]
    prompt: Callable[[], Prompt]


@dataclass(eq=False)
class Questions:
    """Those of ``--data`` or of ``--scenes`` with a response each. ``left_out`` counts the others as they are met."""

    config: VisualRelianceConfig
    renderer: Renderer
    left_out: Counter[str] = field(default_factory=Counter, init=False)

    def __iter__(self) -> Iterator[Asked]:
        """In their order; images are read as they are met. Raises DataError for a malformed set or image."""
        self.left_out.clear()
        given = self._given()
        for question in self._all():
            find = question.reference if given is None else partial(self._written, given, question.id)
            response = self._response(find)
            if response is None:
                continue
            if len(response.token_ids) > self.config.max_response_tokens:
                self.left_out[LONG_RESPONSE] += 1
                continue
            asked = Asked(question.prompt(), response)
            if len(asked.prompt.token_ids) > self.config.max_prompt_tokens:
                self.left_out[LONG_PROMPT] += 1
            else:
                yield asked

    def _response(self, find: Callable[[], Response | None]) -> Response | None:
        try:
            found = find()
        except TextError:
            self.left_out[NOT_IN_FORM] += 1
            return None
        self.left_out[NO_RESPONSE] += found is None
        return found

    def _all(self) -> Iterator[_Question]:
        config, renderer = self.config, self.renderer
        if config.data is None:
            scenes = SceneSource(renderer, split="heldout", seed=config.seed, batch_size=1)
            for example in map(scenes.example, range(config.scenes)):
                yield _Question(example.prompt.id, partial(_same, example.reference), partial(_same, example.prompt))
            return
        records = read_records(config.data, purpose="evaluate")
        if config.part == "validation":
            records = tuple(one for one in records if in_part(one, "validation", validation_share=VALIDATION_SHARE))
        for record in records[: config.limit]:
            render = partial(prompt_of, record, renderer, _CHECKS, max_prompt_tokens=_ANY)
            yield _Question(record.id, partial(reference_of, record, renderer), render)

    def _given(self) -> Mapping[str, str] | None:
        """The whole texts of ``--responses`` by id; None without the flag. Raises DataError as ``read_responses``."""
        if self.config.responses is None:
            return None
        file = file_of(self.config.responses)
        texts = read_responses(str(file), file, mode=self.config.mode).of_segment("whole")
        if not texts:
            raise DataError(f"{file} has no whole responses; give caption, reasoning and answer of each")
        return texts

    def _written(self, texts: Mapping[str, str], id_: str) -> Response | None:
        """The response to a question. Raises TextError for one that is not in the asked form."""
        return self.renderer.written(texts[id_], id=id_) if id_ in texts else None


def _same(value: T) -> T:
    return value
