"""What becomes of every line of a data set: it is kept, or counted under the one reason why it is left out.

A line is bad (malformed, its image cannot be read, its text makes no prompt or reference) or left out on purpose (held
out, too long, without a caption). What is kept depends on the data and the flags alone: a resumed run keeps the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.config.stages.data import OnBad
from prism_megatron.errors import DataError

NUM_SHOWN = 5


class JsonError(DataError):
    """A line is no JSON object, or one that two readers could take for two things."""

    counted_as = "bad_json"


class RepeatedIdError(DataError):
    """An id stands for two records."""

    counted_as = "repeated_id"


class EvaluationOnlyError(DataError):
    """A record of a benchmark whose scores people report."""

    counted_as = "evaluation_only"


class ImageError(DataError):
    """An image file is missing, cannot be read, or is of a shape or depth that cannot be used."""

    counted_as = "bad_image"


class TextError(DataError):
    """Text that makes no prompt or no valid response, or that the tokenizer would take for control tokens."""

    counted_as = "bad_text"


class NothingLeftError(DataError):
    """Every line of a part is left out."""


BAD: Mapping[str, str] = {
    "bad_json": "not a JSON object",
    "bad_field": "with a field that is missing or wrong",
    "repeated_id": "with an id that was used before",
    "evaluation_only": "for evaluation only",
    "bad_image": "with an image that cannot be read",
    "bad_text": "with text that makes no valid prompt or response",
}
HELD_OUT, NO_CAPTION, LONG_PROMPT, LONG_RESPONSE = "held_out", "no_caption", "long_prompt", "long_response"
NOT_SELECTED, NOT_CHECKABLE = "not_selected", "not_checkable"


@dataclass(frozen=True)
class Counts:
    """Of the lines of a set: ``kept``, and how many are left out for each reason. Together they are ``lines``."""

    lines: int
    kept: int
    left_out: Mapping[str, int]
    """by reason; reasons that do not apply are not there"""
    also: Mapping[str, int]
    """figures of those that are kept, such as how many have no reasoning"""
    reasons: Mapping[str, str]
    """what each reason means, in words that follow "3 of 40 are" """
    shown: Sequence[str] = ()
    """the first complaints about bad lines"""

    def text(self) -> str:
        """One line for the reader."""
        also = "; ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.also.items() if count)
        kept = f"{self.kept} of {self.lines} lines are used" + (f" ({also})" if also else "")
        left = ", ".join(f"{count} {self.reasons[name]}" for name, count in self.left_out.items())
        return f"{kept}; left out: {left or 'none'}"

    def to_plain(self) -> dict[str, int]:
        """As the summary has it."""
        return {"lines": self.lines, "kept": self.kept, **self.left_out, **self.also}


class Sieve:
    """Takes note of every line of ``path`` that is left out, and why."""

    def __init__(self, path: Path, *, max_prompt_tokens: int, max_response_tokens: int, part: str) -> None:
        """The bounds and the ``part`` of the set that is read are for the words of its counts."""
        self.lines = 0
        self._path, self._left_out, self._shown = path, Counter[str](), list[str]()
        self._reasons = {
            **BAD,
            HELD_OUT: "held out for validation" if part == "train" else "of the training part",
            NOT_SELECTED: "not in --prompts",
            NO_CAPTION: "without a caption",
            NOT_CHECKABLE: "with an answer that no rule can check (docs/rewards.md)",
            LONG_PROMPT: f"with a prompt of more than {max_prompt_tokens} tokens (--max-prompt-tokens)",
            LONG_RESPONSE: f"with a reference of more than {max_response_tokens} tokens (--max-response-tokens)",
        }

    def leave_out(self, reason: str) -> None:
        """Count a line that is left out on purpose."""
        self._left_out[reason] += 1

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Count a line as bad if the body finds it so."""
        try:
            yield
        except DataError as error:
            self._left_out[error.counted_as] += 1
            if len(self._shown) < NUM_SHOWN:
                self._shown.append(str(error))

    def counts(self, kept: int, on_bad: OnBad, *, offer: str, **also: int) -> Counts:
        """What became of all lines; ``offer`` is what a complaint about bad ones ends in.

        Raises DataError for bad ones where they are to ``fail``, naming the first of them and their number;
        NothingLeftError where none is kept.
        """
        left_out = {name: self._left_out[name] for name in self._reasons if self._left_out[name]}
        counts = Counts(self.lines, kept, left_out, also, self._reasons, tuple(self._shown))
        bad = sum(left_out.get(name, 0) for name in BAD)
        if bad and on_bad == "fail":
            raise DataError(self._complaint(bad) + offer)
        if not kept:
            reasons = ", ".join(
                f"{count} of {self.lines} {'is' if count == 1 else 'are'} {self._reasons[name]}"
                for name, count in left_out.items()
            )
            first = f" ({self._shown[0]})" if self._shown else ""
            raise NothingLeftError(f"{self._path}: no line is left to use: {reasons}{first}")
        return counts

    def _complaint(self, bad: int) -> str:
        if bad == 1:
            return self._shown[0]
        more = f"; and {bad - len(self._shown)} more" if bad > len(self._shown) else ""
        return f"{self._path}: {bad} of {self.lines} lines are bad: {'; '.join(self._shown)}{more}"
