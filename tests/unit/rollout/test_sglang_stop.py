"""Where a served response ends: at the tokens where the embedded engine would have ended it, for the same reason.

Oracles: ``AnswerWatch`` itself, and decoded text as SGLang sees it. Blind to the real server's matching, for which
``tests/sglang`` is there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import GOES_ON, SegmentFinder
from prism_megatron.errors import RolloutError
from prism_megatron.rollout.sglang.engine import SGLangRollout
from tests.unit.data.test_segments import ByteTokenizer
from tests.unit.rollout.attached import END, attached, draw
from tests.unit.rollout.fake_sglang import FOLDER, FakeSGLang, running
from tests.unit.rollout.weights import mini_weights


@pytest.fixture
def fake() -> Iterator[FakeSGLang]:
    with running(image_token_id=498) as fake:
        yield fake


@pytest.fixture
def finder() -> SegmentFinder:
    return Renderer.from_folder(FOLDER).segment_finder


@pytest.fixture
def engine(fake: FakeSGLang, finder: SegmentFinder, tmp_path: Path) -> Iterator[SGLangRollout]:
    engine = attached([fake], tmp_path, finder=finder)
    engine.update_weights(mini_weights(), 0)
    yield engine
    engine.close()


def ids(text: str) -> list[int]:
    return list(Renderer.from_folder(FOLDER).tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_response_is_cut_where_it_goes_on_after_its_answer(engine: SGLangRollout, fake: FakeSGLang) -> None:
    """However late the server stopped; the token that goes on is kept, as its log-prob was sampled."""
    kept, late = [*ids("<answer>3</answer>"), *ids("\n\n"), *ids("I")], ids(" add this")
    fake.tokens = (*kept, *late)
    ((rollout,),) = draw(engine, max_new_tokens=200)
    assert rollout.token_ids == tuple(kept) and rollout.finish_reason == "stop"
    assert rollout.logprobs == pytest.approx([-token / 1000 for token in kept])
    assert "end token" in str(rollout.segments.problem)
    (body,) = [body for path, body in fake.calls if path == "/generate"]
    assert body["sampling_params"]["stop_regex"] == GOES_ON


def test_the_last_token_allowed_is_a_stop_only_as_the_end_token(engine: SGLangRollout, fake: FakeSGLang) -> None:
    """As in the embedded engine; SGLang says ``length`` or ``stop`` by rules of its own."""
    answer = ids("<answer>3</answer>")
    for last, reason in ((END, "stop"), (ids("I")[0], "length"), (ids("\n")[0], "length")):
        fake.tokens = (*answer, last)
        ((rollout,),) = draw(engine, max_new_tokens=len(answer) + 1)
        assert (rollout.token_ids, rollout.finish_reason) == (fake.tokens, reason)


def test_a_server_that_stops_by_a_rule_of_its_own_is_an_error(engine: SGLangRollout, fake: FakeSGLang) -> None:
    fake.tokens = (5, 6)
    with pytest.raises(RolloutError, match=r"ended a response after 2 of 8 tokens with token 6.*generation_config"):
        draw(engine)


def test_servers_never_stop_sooner_than_the_rule() -> None:
    """2,000 responses of random bytes around an answer, one token a byte: white space of several bytes, broken
    characters, long runs of white space. The server's pattern finds nothing before the watch does, and mostly both do.
    """
    finder = SegmentFinder(ByteTokenizer())
    rng = random.Random(0)
    pieces = [" ", "\n", "\t", "\u3000", "\u00a0", "\u2028", "x", "é", "語", "<", "</answer>", "\ufffd"]
    both = 0
    for _ in range(2000):
        tail = b"".join(
            rng.choice(pieces).encode() if rng.random() < 0.85 else bytes([rng.randrange(128, 256)])
            for _ in range(rng.randrange(1, 30))
        )
        data = b"<answer>1</answer>" + tail
        watch = finder.watch()
        fired = next((i for i, byte in enumerate(data, 1) if watch.add(byte)), None)
        found = next(
            (i for i in range(1, len(data) + 1) if re.search(GOES_ON, data[:i].decode(errors="replace"))), None
        )
        assert found is None or (fired is not None and fired <= found), data
        both += found is not None and found == fired
    assert both > 1000, "blind: the pattern hardly ever finds what the watch does"
