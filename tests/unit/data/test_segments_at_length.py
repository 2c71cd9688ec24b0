"""Two thousand generated responses under the strict and the lax rule, for the mini's and Qwen3-VL's own tokenizer.

Oracle: a regular expression on the decoded text, and token spans from the byte lengths that the test itself cut the
text into. Exact, no tolerance. Blind spot: texts that are no UTF-8 (``test_segments.py`` has invalid tokens).
"""

from __future__ import annotations

import random
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.segments import SegmentFinder, byte_alphabet, response_text
from prism_megatron.types import Span

NUM_RESPONSES = 2000
LONG_TOKENS = 8192
NAMES = ("caption", "think", "thought", "answer")
ALL_TAGS = [f"<{slash}{name}>" for slash in ("", "/") for name in NAMES]
NO_TAG = rf"(?!{'|'.join(ALL_TAGS)})"
STRICT = re.compile(
    rf"\s*(<caption>((?:{NO_TAG}.)*)</caption>)\s*"
    rf"(<(think|thought)>((?:{NO_TAG}.)*)</\4>\s*<answer>((?:{NO_TAG}.)*)</answer>)\s*",
    re.DOTALL,
)
LAX = re.compile(
    r"\s*(<caption>(.*?)</caption>)\s*"
    r"(<(think|thought)>(.*?)</(?:think|thought)>\s*<answer>(.*?)</answer>)\s*",
    re.DOTALL,
)
WORDS = [
    *("a", "red circle: 2", " ", "\n", "\n\n- ", "1+1=2", "<", ">", "</", "</thin", "k>", "caption>", "<Caption>"),
    *("é", "e\u0301", "\u00a0", "\u2003", "\ufeff", "🙂", "👩‍🚀", "漢字", "\u202e", "�", "ﬁ", "\x1c", "\0"),
]


def body(rng: random.Random, longest: int = 6) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def gap(rng: random.Random) -> str:
    return rng.choice(["", "", "\n", " ", "\n\n", "\u00a0", "\u2003\t", "\x1c"])


def good(rng: random.Random) -> list[str]:
    """Tags, bodies and gaps of a response that is valid unless a body is white space alone."""
    think = rng.choice(["think", "think", "thought"])
    return [
        *(gap(rng), "<caption>", body(rng), "</caption>", gap(rng), f"<{think}>", body(rng), f"</{think}>", gap(rng)),
        *("<answer>", body(rng), "</answer>", gap(rng)),
    ]


def tags_of(parts: Sequence[str]) -> list[int]:
    return [place for place, part in enumerate(parts) if part in ALL_TAGS]


def valid(rng: random.Random) -> str:
    return "".join(good(rng))


def laid_out(rng: random.Random) -> str:
    """The layout that references have."""
    return response_text(body(rng), body(rng), body(rng))


def nested(rng: random.Random) -> str:
    parts = good(rng)
    inside = [f"<{name}>{body(rng)}</{name}>" for name in rng.choices(NAMES, k=rng.randint(1, 2))]
    parts[rng.choice([2, 6, 10])] = body(rng) + "".join(inside) + body(rng)
    return "".join(parts)


def repeated(rng: random.Random) -> str:
    parts = good(rng)
    place = rng.choice(tags_of(parts))
    return "".join(parts[:place] + [parts[place]] * rng.randint(1, 3) + parts[rng.choice([place, 0]) :])


def missing(rng: random.Random) -> str:
    parts = good(rng)
    for place in rng.sample(tags_of(parts), rng.randint(1, 2)):
        parts[place] = ""
    return "".join(parts)


def reordered(rng: random.Random) -> str:
    parts = good(rng)
    first, second = rng.sample(tags_of(parts), 2)
    parts[first], parts[second] = parts[second], parts[first]
    return "".join(parts)


def outside(rng: random.Random) -> str:
    parts = good(rng)
    parts[rng.choice([0, 4, 8, 12])] += body(rng, 2)
    return "".join(parts)


def empty(rng: random.Random) -> str:
    parts = good(rng)
    parts[rng.choice([2, 6, 10])] = rng.choice(["", " ", "\n\u00a0", "\x1c"])
    return rng.choice(["", " \n", "".join(parts), "".join(parts)])


def soup(rng: random.Random) -> str:
    return "".join(rng.choices([*ALL_TAGS, *WORDS], k=rng.randint(1, 14)))


def long(rng: random.Random) -> str:
    """A body of 8k words, and so of at least as many tokens where it is cut at random; no words that make up tags."""
    parts = good(rng)
    parts[rng.choice([2, 6])] = "".join(rng.choices([word for word in WORDS if ">" not in word], k=LONG_TOKENS))
    return "".join(parts) if rng.random() < 0.5 else "".join(parts) + rng.choice(ALL_TAGS)


KINDS: dict[Callable[[random.Random], str], int] = {
    **dict.fromkeys((valid, laid_out, nested, repeated, missing, reordered, outside, empty), 230),
    soup: 150,
    long: 10,
}


class Cutter:
    """Cuts text into tokens of a vocabulary in any of the ways that spell it, without the tokenizer's merges."""

    def __init__(self, tokenizer: Any) -> None:
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        plain = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if not token.special}
        self.pieces = {
            bytes(byte_of[character] for character in token): i
            for token, i in tokenizer.get_vocab().items()
            if token not in special and token not in plain
        }
        self.pieces |= {token.encode(): i for token, i in plain.items()}
        self.longest = 12

    def cut(self, text: str, rng: random.Random) -> tuple[list[int], list[bytes]]:
        """Token ids and their bytes: at each place any token that fits, whatever tags it splits or spans."""
        data, place = text.encode(), 0
        ids: list[int] = []
        pieces: list[bytes] = []
        while place < len(data):
            fitting = [
                data[place : place + n] for n in range(1, self.longest) if data[place : place + n] in self.pieces
            ]
            piece = rng.choice(fitting)
            ids.append(self.pieces[piece])
            pieces.append(piece)
            place += len(piece)
        return ids, pieces


def expected_spans(match: re.Match[str], pieces: Sequence[bytes]) -> tuple[Span, Span]:
    """From the first token with a byte of the opening tag to the last with one of the closing tag."""
    starts = [0, *accumulate(map(len, pieces))][:-1]

    def span(group: int) -> Span:
        first, stop = (len(match.string[:place].encode()) for place in match.span(group))
        return Span(bisect_right(starts, first) - 1, bisect_right(starts, stop - 1))

    return span(1), span(3)


@pytest.fixture(scope="module", params=["mini", "qwen3_vl"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    folder = MINI_FOLDER / "policy"
    if request.param == "qwen3_vl":
        shared: Path = request.getfixturevalue("shared_dir")
        folder = shared / "qwen3_vl"
        if not (folder / "tokenizer.json").is_file():
            pytest.skip(f"no {folder / 'tokenizer.json'}: Qwen3-VL's own tokenizer")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def oracle(rule: str, text: str) -> re.Match[str] | None:
    """What the rule's pattern finds; the strict rule also wants something in every body."""
    if rule == "lax":
        return LAX.fullmatch(text)
    match = STRICT.fullmatch(text)
    return match if match is not None and all(match[group].strip() for group in (2, 5, 6)) else None


def generated(tokenizer: Any, finder: SegmentFinder) -> Iterator[tuple[str, list[int], list[bytes]]]:
    """Kind, token ids and their bytes of every response; a third is cut by the tokenizer itself, the others anyhow."""
    rng, cutter = random.Random(20260), Cutter(tokenizer)
    for kind, count in KINDS.items():
        for number in range(count):
            text = kind(rng)
            if number % 3:
                ids, pieces = cutter.cut(text, rng)
                assert kind is not long or len(ids) >= LONG_TOKENS
            else:
                ids = tokenizer(text)["input_ids"]
                pieces = [finder._token_bytes(i) or b"" for i in ids]
            yield kind.__name__, ids, pieces


def test_two_thousand_responses_agree_with_the_oracle(tokenizer: Any) -> None:
    """Claim: both rules judge every response as their pattern does, with spans exact in tokens, however tags are cut.

    The text that counts is the decoded one: Qwen's own tokenizer normalises what it cuts.
    """
    finders = {"strict": SegmentFinder(tokenizer), "lax": SegmentFinder(tokenizer, strict=False)}
    seen: Counter[tuple[str, str, bool]] = Counter()
    pieces_of_tags = 0
    for kind, ids, pieces in generated(tokenizer, finders["strict"]):
        text = tokenizer.decode(ids)
        assert text.encode() == b"".join(pieces)
        pieces_of_tags += "<caption>" in text and not any(b"caption" in piece for piece in pieces)
        for rule, finder in finders.items():
            match, found = oracle(rule, text), finder.find([*ids, tokenizer.eos_token_id])
            assert found.valid == (match is not None), (rule, found.problem, text[:300])
            spans = (None, None) if match is None else expected_spans(match, pieces)
            assert (found.perception, found.reasoning) == spans, (rule, text[:300])
            seen[rule, kind, found.valid] += 1

    assert sum(seen.values()) == 2 * NUM_RESPONSES
    assert pieces_of_tags > NUM_RESPONSES / 20, "even the names of tags must come in pieces"
    for name in ("valid", "laid_out", "long"):
        assert seen["strict", name, True] and seen["strict", name, False], name
    for name in ("nested", "repeated", "empty"):
        assert seen["lax", name, True] > 20 and not seen["strict", name, True], f"{name} tells the two rules apart"
    for name in ("missing", "reordered", "outside", "soup"):
        assert all(seen[rule, name, False] > 20 for rule in finders), name


def test_the_lax_rule_still_needs_an_end(tokenizer: Any) -> None:
    """Claim: a cut-off response and one with a control token inside are invalid under the lax rule too.

    And its watch never stops a response, since a later closing tag may make it valid again.
    """
    finder = SegmentFinder(tokenizer, strict=False)
    ids = tokenizer(response_text("a", "b", "c"))["input_ids"]
    end = tokenizer.eos_token_id
    assert finder.find([*ids, end]).valid
    assert not finder.find(ids).valid
    assert not finder.find([*ids[:2], end, *ids[2:], end]).valid
    more = [*ids, *tokenizer(" and </answer>")["input_ids"]]
    watch = finder.watch()
    assert not any(watch.add(token_id) for token_id in more)
    assert finder.find([*more, end]).valid
    assert not SegmentFinder(tokenizer).find([*more, end]).valid


def test_the_lax_rule_is_linear(tokenizer: Any) -> None:
    """Claim: 200,000 tokens made to backtrack are judged in under two seconds of processor time."""
    finder = SegmentFinder(tokenizer, strict=False)
    ids = tokenizer("<caption></caption><think></think> <answer></answer>")["input_ids"] * 20_000
    started = time.process_time()
    assert not finder.find([*ids[:200_000], *tokenizer("x")["input_ids"], tokenizer.eos_token_id]).valid
    assert time.process_time() - started < 2.0
