"""The segment finder against a regular-expression oracle on the decoded text, over every way tokens can split tags."""

from __future__ import annotations

import re
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import SegmentFinder, byte_alphabet, parse_response, response_text
from prism_megatron.types import Span

GOOD = response_text("- red circle: 2", "red circle: 2", "2")
NO_TAG = r"(?!</?(?:caption|think|thought|answer)>)"
ORACLE = re.compile(
    rf"\s*(<caption>(?:{NO_TAG}.)*</caption>)\s*"
    rf"(<(think|thought)>(?:{NO_TAG}.)*</\3>\s*<answer>(?:{NO_TAG}.)*</answer>)\s*",
    re.DOTALL,
)
BODIES = re.compile(r"<(\w+)>(.*?)</\1>", re.DOTALL)

pieces = st.sampled_from(
    [f"<{slash}{name}>" for slash in ("", "/") for name in ("caption", "think", "thought", "answer")]
    + ["a", " ", "\n", "é", "\u00a0", "<", ">", "</", "think>", "><", "🙂"]
)
texts = st.one_of(
    st.lists(pieces, max_size=12).map("".join),
    st.tuples(*(st.lists(pieces, max_size=2).map("".join) for _ in range(7))).map(
        lambda gaps: "<caption>{}x{}</caption>{}<think>{}y</think>{}<answer>{}z</answer>{}".format(*gaps)
    ),
    st.tuples(*(st.text(alphabet="<>/ab \n\u2003é", max_size=4) for _ in range(4))).map(
        lambda gaps: "<caption>{}</caption>{}<thought>{}</thought>\n<answer>{}</answer>".format(*gaps)
    ),
)


def oracle(text: str) -> tuple[str, str] | None:
    """The two judged parts of a valid text, else None."""
    match = ORACLE.fullmatch(text)
    if match is None or not all(body.strip() for _, body in BODIES.findall(text)):
        return None
    return match[1], match[2]


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=texts, cuts=st.sets(st.integers(0, 120)))
def test_a_watch_sees_the_first_token_that_goes_on_after_the_answer(
    renderer: Renderer, text: str, cuts: set[int]
) -> None:
    """Claim: it says so from the first token on after which something other than white space follows ``</answer>``.

    Characters split over tokens count once they are whole. A valid response is therefore never cut.
    """
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    ids = [i for a, b in pairwise(bounds) for i in renderer.tokenizer(text[a:b])["input_ids"]]
    watch, finder = renderer.segment_finder.watch(), renderer.segment_finder
    held = b""
    for token_id in ids:
        held += finder._token_bytes(token_id) or b""
        after = held.partition(b"</answer>")[2].decode("utf-8", errors="ignore")
        in_vain = watch.add(token_id)
        assert in_vain == bool(after.strip())
        if in_vain:
            assert not finder.find([*ids, renderer.end_token_id]).valid
            return


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=texts, cuts=st.sets(st.integers(0, 120)))
def test_finder_agrees_with_the_oracle(renderer: Renderer, text: str, cuts: set[int]) -> None:
    """Claim: validity equals the oracle's; spans are the fewest tokens that cover the two parts.

    ``cuts`` splits the text before tokenisation, so tags arrive in arbitrary pieces.
    """
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    ids = [i for a, b in pairwise(bounds) for i in renderer.tokenizer(text[a:b])["input_ids"]]
    found = renderer.segment_finder.find([*ids, renderer.end_token_id])
    expected = oracle(text)
    assert found.valid == (expected is not None), found.problem
    if expected is not None:
        assert found.perception is not None and found.reasoning is not None
        for span, part in zip((found.perception, found.reasoning), expected, strict=True):
            assert part in renderer.decode(ids[span.start : span.end])
            assert part not in renderer.decode(ids[span.start + 1 : span.end])
            assert part not in renderer.decode(ids[span.start : span.end - 1])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "<caption> appears 0 times"),
        (GOOD.replace("<think>", "<thought>"), "</think> appears 1 times"),
        (GOOD + GOOD, "<caption> appears 2 times"),
        ("hello " + GOOD, "text before <caption>"),
        (GOOD + "!", "text after the last tag"),
        (response_text(" ", "a", "b"), "<caption> is empty"),
        (response_text("a", "\u00a0", "b"), "<think> is empty"),
        ("<think>b</think><caption>a</caption><answer>c</answer>", "text before <caption>"),
        ("<caption>a<think></caption>b</think><answer>c</answer>", "<think> is out of order"),
        ("</caption>a<caption><think>b</think><answer>c</answer>", "<caption> is out of order"),
    ],
)
def test_every_kind_of_invalid_response_is_named(text: str, problem: str) -> None:
    parsed = parse_response(text.encode())
    assert isinstance(parsed, str) and problem in parsed


def test_end_token_and_control_tokens(renderer: Renderer) -> None:
    """Claim: a cut-off response, a control token inside and an id beyond the vocabulary are all invalid."""
    find, end = renderer.segment_finder.find, renderer.end_token_id
    ids = renderer.tokenizer(GOOD)["input_ids"]
    assert find([*ids, end]).valid
    assert find(ids).problem == "the response does not end in the end token"
    assert find([]).problem == "the response does not end in the end token"
    for bad in (renderer.image_token_id, renderer.pad_token_id, end, 10**6, -1):
        assert "control token or unknown" in str(find([*ids[:5], bad, *ids[5:], end]).problem)


def test_a_control_token_after_the_answer_is_seen_at_once(renderer: Renderer) -> None:
    """Before its end it says nothing, also where the closing tag is cut before its last byte."""
    watch = renderer.segment_finder.watch()
    cut = [token for part in (GOOD[:-1], GOOD[-1:]) for token in renderer.tokenizer(part)["input_ids"]]
    assert not any(watch.add(token) for token in (renderer.image_token_id, *cut))
    assert watch.add(renderer.image_token_id)


class ByteTokenizer:
    """Vocabulary of the 256 bytes, a token that ends one tag and opens the next, and an end token."""

    eos_token_id = 257

    def __init__(self) -> None:
        self.added_tokens_decoder: dict[int, Any] = {}

    def __len__(self) -> int:
        return 258

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return "><" if token_id == 256 else byte_alphabet()[token_id]


def test_a_token_shared_by_two_tags_belongs_to_both_spans() -> None:
    text = b"<caption>a</caption><think>b</think><answer>c</answer>"
    cut = text.index(b"><think>")
    ids = [*text[:cut], 256, *text[cut + 2 :], 257]
    found = SegmentFinder(ByteTokenizer()).find(ids)
    assert found.perception == Span(0, cut + 1)
    assert found.reasoning == Span(cut, len(ids) - 1)


def test_long_responses_take_linear_time(renderer: Renderer) -> None:
    """Claim: 200,000 tokens of repeated opening tags are judged in under two seconds."""
    ids = renderer.tokenizer("<caption> <answer>" * 40)["input_ids"]
    started = time.process_time()
    assert not renderer.segment_finder.find((ids * (200_000 // len(ids))) + [renderer.end_token_id]).valid
    assert time.process_time() - started < 2.0
