"""Which questions about images a run admits before its first step, and what it does about those that fail later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from prism_megatron.config.stages.data import CheckImages, DataConfig, OnBad
from prism_megatron.data.pictures.files import Seen, look_at, open_image
from prism_megatron.data.reading.intake import LONG_PROMPT, ImageError, Sieve
from prism_megatron.data.render import Renderer
from prism_megatron.types import Prompt

_SKIP = "--on-bad skip --check-images all"

Look = Callable[[Sequence[Path], bool], Sequence[Seen]]
"""What is seen of each file: of its header or, with True, of all of it. Several ranks may share the work."""


def look_alone(paths: Sequence[Path], pixels: bool) -> Sequence[Seen]:
    """All files, in this process."""
    return look_at(paths, pixels=pixels)


@dataclass(frozen=True)
class Checks:
    """How much is known before the first step, and what is done about what is bad. Fields are those of the flags."""

    images: CheckImages = DataConfig.check_images
    on_bad: OnBad = DataConfig.on_bad
    look: Look = look_alone
    has_flags: bool = True
    """whether the command has the flags to say otherwise, so that a complaint may offer them"""

    @property
    def offer(self) -> str:
        """What a complaint before the first step ends in."""
        return f"; put that right, or leave out what is bad by {_SKIP}" if self.has_flags else ""

    @property
    def late_offer(self) -> str:
        """What a complaint about an image at its step ends in."""
        return (
            f"; put the file right and go on, or go on without it by {_SKIP} --change on-bad" if self.has_flags else ""
        )


class Asked(Protocol):
    """A question about an image that was read from a file."""

    @property
    def where(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def image(self) -> Path: ...
    @property
    def question_text(self) -> str: ...


AskedT = TypeVar("AskedT", bound=Asked)


def admitted(
    asked: Sequence[AskedT], sieve: Sieve, renderer: Renderer, checks: Checks, *, max_prompt_tokens: int
) -> list[AskedT]:
    """Those whose image can be read, as far as it is looked at, and whose prompt is not too long, in their order.

    The others are counted in ``sieve``. Each file is looked at once.
    """
    files = list(dict.fromkeys(one.image for one in asked)) if checks.images != "off" else []
    seen = dict(zip(files, checks.look(files, checks.images == "all"), strict=True)) if files else {}
    kept = []
    for one in asked:
        with sieve.catching():
            found = seen.get(one.image)
            if isinstance(found, str):
                raise ImageError(f"{one.where}: field image: {found}")
            size = None if found is None else [found]
            if size and renderer.num_prompt_tokens(one.where, one.question_text, size) > max_prompt_tokens:
                sieve.leave_out(LONG_PROMPT)
            else:
                kept.append(one)
    return kept


def prompt_of(asked: Asked, renderer: Renderer, checks: Checks, *, max_prompt_tokens: int) -> Prompt:
    """The prompt with its image read.

    Raises ImageError, naming the line, for a file that was not checked, or has changed since it was.
    """
    try:
        prompt = renderer.prompt(asked.id, asked.question_text, [open_image(asked.image)])
    except ImageError as error:
        raise ImageError(f"{asked.where}: field image: {error}{checks.late_offer}") from error
    if len(prompt.token_ids) > max_prompt_tokens:
        raise ImageError(
            f"{asked.where}: a prompt of {len(prompt.token_ids)} tokens, of which --max-prompt-tokens allows "
            f"{max_prompt_tokens}; --check-images headers leaves such prompts out before the first step"
        )
    return prompt
