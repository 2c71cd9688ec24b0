"""Conversations as JSON lines: what is read, and what is refused by line and field."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from prism_megatron.data.conversation import Conversation, Picture, Turn
from prism_megatron.data.formats.conversations import ConversationLines
from prism_megatron.data.formats.files.base import Corpus
from prism_megatron.errors import DataError

USER = {"role": "user", "parts": [{"text": "Look: "}, {"image": "images/7.png"}]}
ANSWER = {"role": "assistant", "parts": "Two."}
WHOLE: dict[str, Any] = {"id": "7", "source": "mine", "answer": "2", "turns": [USER, ANSWER]}


def written(folder: Path, *values: Any) -> ConversationLines:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(folder / "images" / "7.png")
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ConversationLines(folder / "data.jsonl")


def read(corpus: Corpus) -> list[Conversation]:
    return [corpus.read(shard, place) for shard in corpus.shards() for place in corpus.scan(shard)]


def test_lines_become_conversations(tmp_path: Path) -> None:
    system, more = {"role": "system", "parts": "Be brief."}, {"role": "user", "parts": "And red?"}
    long = {"id": "8", "source": "mine", "turns": [system, USER, ANSWER, more, ANSWER]}
    corpus = written(tmp_path, WHOLE, "", long)
    picture = Picture(tmp_path / "images" / "7.png")
    user, answer = Turn("user", ("Look: ", picture)), Turn("assistant", ("Two.",))
    assert read(corpus) == [
        Conversation("7", (user, answer), "mine", "2"),
        Conversation("8", (Turn("system", ("Be brief.",)), user, answer, Turn("user", ("And red?",)), answer), "mine"),
    ]
    assert isinstance(corpus, Corpus)
    assert read(pickle.loads(pickle.dumps(corpus))) == read(corpus)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": []}, "field turns: .* and they are none"),
        ({"turns": {}}, "field turns: a list expected"),
        ({"turns": [USER]}, ".*and they are user$"),
        ({"turns": [ANSWER, USER, ANSWER]}, ".*and they are assistant, user, assistant"),
        ({"turns": [USER, ANSWER, {"role": "system", "parts": "x"}]}, ".*and they are user, assistant, system"),
        ({"turns": [{"role": "tool", "parts": "x"}, ANSWER]}, "turn 1: field role: 'tool' is none of"),
        ({"turns": [{"role": ["user"], "parts": "x"}, ANSWER]}, "turn 1: field role: "),
        ({"turns": [{"role": "user", "content": "x"}, ANSWER]}, "turn 1: an object of role and parts expected"),
        ({"turns": [{"role": "user", "parts": []}, ANSWER]}, "turn 1: field parts: text, or a list"),
        ({"turns": [{"role": "user", "parts": [{"video": "x"}]}, ANSWER]}, "turn 1: field parts: objects with text or"),
        ({"turns": [USER, {"role": "assistant", "parts": " "}]}, "turn 2: field text: text that is not empty"),
        ({"turns": [USER, USER | {"role": "assistant"}]}, "turn 2: field parts: an image in a turn of the assistant"),
        ({"turns": [{"role": "user", "parts": [{"image": "../x.png"}]}, ANSWER]}, "turn 1: field image: .* below"),
        (
            {"turns": [{"role": "user", "parts": [{"image": "x.png"}]}, ANSWER]},
            "turn 1: field image: .* cannot be found",
        ),
        ({"id": 7}, "field id: "),
        ({"answer": 2}, "field answer: "),
        ({"other": 1}, "field other: unknown"),
    ],
)
def test_malformed_lines_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path}/data\.jsonl:1: {message}"):
        read(written(tmp_path, WHOLE | change))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "parts", "text", "image"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(["id", "source", "turns", "answer"]), value=json_values, cut=st.integers(0, 400))
def test_whatever_stands_there_is_read_or_named(key: str, value: Any, cut: int, tmp_path: Path) -> None:
    """Claim: a conversation or one DataError that begins with file and line; nothing else is ever raised."""
    line = json.dumps(WHOLE | {key: value})
    for text in (line, line[: cut % len(line)] or "x"):
        corpus = written(tmp_path, text)
        try:
            (conversation,) = read(corpus)
        except DataError:
            with pytest.raises(DataError, match=rf"^{tmp_path}/data\.jsonl:1: "):
                read(corpus)
        else:
            assert conversation.turns[-1].role == "assistant"


def test_benchmarks_are_refused_for_training(tmp_path: Path) -> None:
    """Claim: by source and by sets.json, and read for evaluation: as in every other format."""
    corpus = written(tmp_path / "set", {**WHOLE, "source": "mathvision/test"})
    with pytest.raises(DataError, match=r"data.jsonl:1: field source: 'mathvision/test' is for evaluation only"):
        read(corpus)
    assert len(read(replace(corpus, purpose="evaluate"))) == 1
    fine = written(tmp_path / "set", WHOLE)
    assert len(read(fine)) == 1
    (tmp_path / "sets.json").write_text('{"set": {"evaluation_only": true}}')
    with pytest.raises(DataError, match="set is for evaluation only; train on another set"):
        read(fine)
    assert len(read(replace(fine, purpose="evaluate"))) == 1
