"""Which two problems are one, and which problem gives an evaluation away.

Two problems of the pool are **the same** where their pictures have the same pixels (however they are stored), and
their questions and answers are the same but for case and white space. They are **near** where their answers are equal
and

* their pictures look alike and their questions share a tenth of their words: one question put in other words.
  Answers of yes and no are left out of this, since other questions about the picture have them too; or
* their questions are the same by their text (``text_overlap`` of their shingles) and their pictures look nearly alike,
  such as one that was made so much brighter that parts of it became white.

Pictures look alike where their perceptual hashes differ in at most ``image_distance`` bits (three times that for the
same question) and no place of their small looks differs by more than a bound (``look.differences``). Hashes alone tell
the pictures of one generator apart badly: a digit, or a colour, that is another one changes few bits or none.

A problem is **near an evaluation record**, whatever the answers, where their pictures are alike by wider bounds, or
where their questions are the same by their text and that has twelve words or more. So a picture that was cropped is
found by its question only: a tenth cut off changes 18 bits of 64 and most of the look.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prism_megatron.config.tools.curate import Duplicates
from prism_megatron.curation.duplicates.bands import share_a_band
from prism_megatron.curation.duplicates.hashes import Hashes
from prism_megatron.curation.duplicates.look import differences
from prism_megatron.curation.duplicates.scratch import Scratch
from prism_megatron.curation.duplicates.words import Shingles, Words, overlap, shingles_of, words_of

_SHARED_WORDS = 0.1
_TELLING_WORDS = 12
_WIDER_SAME_TEXT, _WIDER_EVALUATION = 3, 2
_LOOK, _LOOK_SAME_TEXT, _LOOK_EVALUATION = 32.0, 40.0, 48.0
"""of 255 levels"""
_AT_ONCE = 128
_TEXTS_KEPT = 4096

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class _Text(NamedTuple):
    words: Words
    shingles: Shingles
    length: int
    """in words"""


class Rule:
    """Judges pairs of records, which it is given by their numbers."""

    def __init__(self, hashes: Hashes, scratch: Scratch, rules: Duplicates) -> None:
        self._hashes, self._scratch, self._rules = hashes, scratch, rules
        self._text = lru_cache(_TEXTS_KEPT)(self._read)

    @property
    def same_text_distance(self) -> int:
        """Bits by which pictures of one question may differ."""
        return min(64, _WIDER_SAME_TEXT * self._rules.image_distance)

    @property
    def evaluation_distance(self) -> int:
        """Bits by which a picture of an evaluation record may differ."""
        return min(64, _WIDER_EVALUATION * self._rules.image_distance)

    def may_be_near(self, one: Numbers, other: Numbers, bits: npt.NDArray[np.uint8]) -> Mask:
        """Of pairs in the pool, whether they are worth a second look; nothing is read for it."""
        hashes = self._hashes
        found = (hashes.answer_N[one] == hashes.answer_N[other]) & (bits <= self.same_text_distance)
        in_other_words = self._in_other_words(one, bits)
        for part in np.array_split(np.flatnonzero(found & ~in_other_words), 1 + len(one) // 2**16):
            found[part] = share_a_band(hashes.bands_N_B[one[part]], hashes.bands_N_B[other[part]])
        return np.asarray(found)

    def near(self, one: Numbers, other: Numbers, bits: npt.NDArray[np.uint8]) -> Mask:
        """Of pairs that ``may_be_near``, whether they are."""
        looks = self._looks(one, other)
        found = looks <= _LOOK_SAME_TEXT
        in_other_words = self._in_other_words(one, bits) & (looks <= _LOOK)
        for i in np.flatnonzero(found):
            texts = self._text(int(one[i])), self._text(int(other[i]))
            found[i] = self._same_text(*texts) or (
                in_other_words[i] and overlap(texts[0].words, texts[1].words) >= _SHARED_WORDS
            )
        return np.asarray(found)

    def gives_picture_away(self, one: Numbers, other: Numbers) -> Mask:
        """Of pairs of a problem and an evaluation record within ``evaluation_distance``, whether both look alike."""
        return np.asarray(self._looks(one, other) <= _LOOK_EVALUATION)

    def gives_text_away(self, one: Numbers, other: Numbers) -> Mask:
        """Of pairs of a problem and an evaluation record, whether both ask the same, in enough words to tell it."""
        pairs = [(self._text(int(first)), self._text(int(second))) for first, second in zip(one, other, strict=True)]
        return np.asarray(
            [min(a.length, b.length) >= _TELLING_WORDS and self._same_text(a, b) for a, b in pairs], dtype=np.bool_
        )

    def _in_other_words(self, one: Numbers, bits: npt.NDArray[np.uint8]) -> Mask:
        return np.asarray((bits <= self._rules.image_distance) & self._hashes.telling_N[one])

    def _same_text(self, one: _Text, other: _Text) -> bool:
        return overlap(one.shingles, other.shingles) >= self._rules.text_overlap

    def _looks(self, one: Numbers, other: Numbers) -> npt.NDArray[np.float32]:
        """By how much the looks of pairs differ."""
        pictures = self._hashes.picture_N
        found = np.zeros(len(one), dtype=np.float32)
        for start in range(0, len(one), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            looks = (self._scratch.looks(pictures[numbers[part]].astype(np.int64)) for numbers in (one, other))
            found[part] = differences(*looks)
        return found

    def _read(self, number: int) -> _Text:
        words = words_of(self._scratch.question(number).text)
        return _Text(frozenset(words), shingles_of(words), len(words))
