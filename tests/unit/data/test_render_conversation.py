"""Conversations become tokens, labels and pixels as transformers makes them, and as prompt and response are made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism_megatron.data.conversation import Conversation, Picture, Turn
from prism_megatron.data.records import Record, read_records
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.segments import response_text
from prism_megatron.data.tokenizer import CONTROL_TOKENS, MARKUP_TOKENS
from prism_megatron.errors import DataError
from tests.unit.data.crafted import ANSWERS, CRAFTED, dialogue, noise, picture
from tests.unit.data.formats.sets import data_of
from tests.unit.data.transformers_oracle import Oracle, assert_equal, opened

NUM_RECORDS = 12
"""Of each set."""
NUM_REAL = 500
"""Of all sets together, in the long test."""
SETS = ("nlvr", "tabmwp", "puzzlevqa", "mathvision_testmini")


@pytest.fixture(scope="session")
def qwen_folder(shared_dir: Path) -> Path:
    return shared_dir / "qwen3_vl"


@pytest.fixture(scope="session", params=["mini", "qwen"])
def folder(request: pytest.FixtureRequest) -> Path:
    """The mini's processing and the real model's."""
    found: Path = request.getfixturevalue(f"{request.param}_folder")
    return found


@pytest.fixture(scope="session")
def both(folder: Path) -> tuple[Renderer, Oracle]:
    return Renderer.from_folder(folder), Oracle(folder)


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_conversations_render_as_transformers_does(name: str, both: tuple[Renderer, Oracle]) -> None:
    """Claim: ids, labels of the last turn and of all, and pixels are equal exactly; lengths are known without pixels.

    Blind spot: labels are not compared where an answer begins with a line end, see the test below.
    """
    assert len(CRAFTED) >= 60
    assert_equal(CRAFTED[name], *both)


def test_the_system_prompt_is_for_conversations_without_a_system_turn(folder: Path) -> None:
    renderer = Renderer.from_folder(folder, system_prompt="Answer in <think> tags.")
    oracle = Oracle(folder)
    for name, conversation in CRAFTED.items():
        if "large" not in name and "long" not in name:
            assert_equal(conversation, renderer, oracle, system_prompt="Answer in <think> tags.")


def test_a_line_end_that_opens_an_answer_is_no_label_where_it_shares_a_token(both: tuple[Renderer, Oracle]) -> None:
    r"""Claim: the real tokenizer reads ``assistant\n`` and ``\n\nThis`` with one token of three line ends, which a
    model that is asked to answer never samples; the labels begin after it and end with the end token."""
    renderer, _ = both
    row, mask = ConversationRenderer(renderer, label_turns="last")(CRAFTED["line ends around"])
    labels = [token for token, weight in zip(row.token_ids, mask, strict=True) if weight]
    assert renderer.decode(labels).lstrip("\n") == "This.\n\n<|im_end|>"
    before = renderer.decode(row.token_ids[: mask.index(1.0)])
    assert before.rstrip("\n").endswith("assistant") and before + renderer.decode(labels) + "\n" == renderer.decode(
        row.token_ids
    )


def test_one_turn_is_prompt_and_response(both: tuple[Renderer, Oracle]) -> None:
    """Claim: one code path: a demonstration is what rollouts are asked and what references are, plus a line end."""
    renderer, _ = both
    image = picture(96, 64)
    prompt = renderer.prompt("p", "How many?", [opened(image)])
    row, mask = renderer.training_row(prompt, renderer.response("- two circles", "one and one", "2"))
    ours, our_mask = ConversationRenderer(renderer, label_turns="last")(dialogue((image, "How many?"), ANSWERS))
    assert renderer.decode(ours.token_ids[len(row.token_ids) :]) == "\n"
    assert ours.token_ids[: len(row.token_ids)] == row.token_ids
    assert our_mask == [*mask, *[0.0] * (len(our_mask) - len(mask))]
    assert np.array_equal(ours.images[0].pixel_values_P_D, row.images[0].pixel_values_P_D)


@pytest.mark.parametrize("name", SETS)
def test_real_records_render_as_transformers_does(name: str, shared_dir: Path, qwen: tuple[Renderer, Oracle]) -> None:
    """Claim: exact equality, evenly spread over the set (blind spot: the rest of it, see the next test)."""
    for record in spread(shared_dir, name, NUM_RECORDS):
        assert_equal(demonstration(record), *qwen)


@pytest.mark.long
def test_five_hundred_real_records_render_as_transformers_does(
    shared_dir: Path, qwen: tuple[Renderer, Oracle], capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: exact equality of 500 records, 125 of each of the four sets; counts are printed."""
    compared: Counter[str] = Counter()
    for name in SETS:
        for record in spread(shared_dir, name, NUM_REAL // len(SETS)):
            assert_equal(demonstration(record), *qwen)
            compared[name] += 1
    with capsys.disabled():
        print(f"\n{compared.total()} real records are equal in ids, labels and pixels: {dict(compared)}")
    assert compared.total() >= NUM_REAL


def spread(shared: Path, name: str, count: int) -> list[Record]:
    """Records of a set at even distances. None of them is trained on."""
    records = read_records(shared / "data" / name, purpose="evaluate")
    return [records[i * len(records) // count] for i in range(count)]


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> tuple[Renderer, Oracle]:
    return Renderer.from_folder(qwen_folder), Oracle(qwen_folder)


def demonstration(record: Record) -> Conversation:
    answer = response_text(record.caption or "none", record.solution or "none", record.answer)
    turns = (Turn("user", (Picture(record.image), record.question_text)), Turn("assistant", (answer,)))
    return Conversation(record.id, turns, record.source, record.answer)


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, *MARKUP_TOKENS])
def test_added_tokens_are_refused_wherever_they_stand(token: str, renderer: Renderer) -> None:
    """Claim: in any turn, by name; but the tags of thinking may stand in a system turn, and once in an answer."""
    render = ConversationRenderer(renderer, label_turns="last")
    with pytest.raises(DataError, match=r"record-7: a turn of the user: the text holds"):
        render.measure(dialogue(f"a{token}b", "c", id="record-7"))
    with pytest.raises(DataError, match=r"record-7: a turn of the assistant: the text holds"):
        render(dialogue("a", "b", "c", f"d {token} e", id="record-7"))
    if token not in ("<think>", "</think>"):
        with pytest.raises(DataError, match=r"record-7: a turn of the system: the text holds"):
            render(dialogue("a", "b", id="record-7", system=f"x{token}"))


def test_thinking_twice_is_refused(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="the text holds '<think>'"):
        ConversationRenderer(renderer, label_turns="last")(dialogue("a", "<think>b</think><think>c</think>"))


def test_broken_pictures_are_refused_by_the_conversation(renderer: Renderer, tmp_path: Path) -> None:
    """Claim: bytes that are no image, a shape that no patches fit and a file cut short are errors that say where."""
    render = ConversationRenderer(renderer, label_turns="last")
    (tmp_path / "cut.png").write_bytes(data_of(noise(64, 64))[:2000])
    cases: list[tuple[Picture, str, bool]] = [
        (Picture(b"no image"), "record-7: the image in the record: the image cannot be read", True),
        (picture(500, 1), "record-7: an image of 500x1", True),
        (Picture(tmp_path / "cut.png"), r"record-7: .*cut\.png: the image cannot be read", False),
    ]
    for bad, message, seen_by_header in cases:
        conversation = dialogue((bad, "What?"), "That.", id="record-7")
        with pytest.raises(DataError, match=message):
            render(conversation)
        if seen_by_header:
            with pytest.raises(DataError, match=message):
                render.measure(conversation)


def test_a_template_that_rewrites_answers_is_refused(mini_folder: Path) -> None:
    """Claim: a template that strips what the assistant says would move labels, and is named instead."""
    renderer = Renderer.from_folder(mini_folder)
    template = renderer.tokenizer.chat_template
    renderer.tokenizer.chat_template = template.replace("{{- message.content }}", "{{- message.content | upper }}")
    with pytest.raises(DataError, match="does not render what the assistant says"):
        ConversationRenderer(renderer, label_turns="last")(dialogue("a", "b"))
    renderer.tokenizer.chat_template = template.replace("<|image_pad|>", "")
    with pytest.raises(DataError, match="does not give every picture one place"):
        ConversationRenderer(renderer, label_turns="last")(dialogue((picture(64, 64), "a"), "b"))


def test_the_fingerprint_tells_what_changes_lengths(mini_folder: Path, tmp_path: Path) -> None:
    def of(renderer: Renderer, turns: Any = "last") -> str:
        return ConversationRenderer(renderer, label_turns=turns).fingerprint

    plain = of(Renderer.from_folder(mini_folder))
    assert plain == of(Renderer.from_folder(mini_folder))
    other_template, other_sizes = Renderer.from_folder(mini_folder), Renderer.from_folder(mini_folder)
    other_template.tokenizer.chat_template += " "
    other_sizes.preprocessor._processor.size["longest_edge"] = 64 * 64
    others = [
        of(Renderer.from_folder(mini_folder, system_prompt="")),
        of(Renderer.from_folder(mini_folder), "all"),
        of(other_template),
        of(other_sizes),
    ]
    assert len({plain, *others}) == 5


def test_the_fingerprint_tells_limits_that_are_close(mini_folder: Path) -> None:
    """Claim: also limits that no probed size shows apart: lengths of other sizes may differ."""
    prints = [
        ConversationRenderer(Renderer.from_folder(mini_folder, max_pixels=most), label_turns="last").fingerprint
        for most in (None, 128 * 128, 1_000_000, 1_000_001)
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


words = st.text(
    alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n \t<>|ab"), min_size=1, max_size=40
).filter(lambda text: text.strip() != "" and not any(token in text for token in (*CONTROL_TOKENS, *MARKUP_TOKENS)))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(words, min_size=2, max_size=6), pictures=st.integers(0, 2))
def test_any_text_renders_as_transformers_does(texts: list[str], pictures: int, both: tuple[Renderer, Oracle]) -> None:
    """Claim: for whatever people write; the decoded labels are the answer but for line ends before it."""
    renderer, oracle = both
    turns: list[tuple[str | Picture, ...]] = [(text,) for text in texts[: len(texts) // 2 * 2]]
    turns[0] = (*[picture(64, 32)] * pictures, *turns[0])
    assert_equal(dialogue(*turns), renderer, oracle)
