"""The SGLang client while another thread updates the weights or closes it.

The servers are fakes that end an answer only when they have a certain version, so no test waits for luck. Blind to what
a real server does with a request in an update, for which ``tests/sglang/test_ahead.py`` is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.errors import RolloutError, WeightSyncError
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.types import Prompt, Rollout, VersionSpan
from tests.unit.rollout.attached import IMPATIENT
from tests.unit.rollout.fake_sglang import FOLDER, KEY, FakeSGLang, running
from tests.unit.rollout.tiny_qwen import NoSegments
from tests.unit.rollout.weights import mini_weights
from tests.waiting import PATIENCE_SECONDS, wait_for

LONG = 77
"""Token of the prompts whose answers take until an update."""


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(image_token_id=498)) for _ in range(2)]


@pytest.fixture
def engine(fakes: list[FakeSGLang], tmp_path: Path) -> Iterator[SGLangRollout]:
    engine = SGLangRollout(
        FOLDER,
        NoSegments(),
        urls=[fake.url for fake in fakes],
        api_key=KEY,
        end_token_ids=[488],
        spool=tmp_path,
        options=SGLangOptions(max_in_flight=4, seconds=PATIENCE_SECONDS, patience=IMPATIENT),
    )
    engine.update_weights(mini_weights(), version=3)
    yield engine
    engine.close()


@pytest.fixture
def beside() -> Iterator[Callable[..., Future[Any]]]:
    """Calls a function in another thread."""
    with ThreadPoolExecutor(4) as threads:
        yield threads.submit


def generate(engine: SGLangRollout, *token_ids: int) -> list[tuple[Rollout, ...]]:
    prompts = [Prompt(str(token), (token, 6), (), "") for token in token_ids]
    return engine.generate(SampleRequest(prompts, 2, Sampling(max_new_tokens=8), seed=0, step=0))


def num_requests(fakes: list[FakeSGLang]) -> int:
    return sum(fake.paths().count("/generate") for fake in fakes)


def test_an_answer_that_an_update_overtakes_has_both_versions(
    engine: SGLangRollout, fakes: list[FakeSGLang], beside: Callable[..., Future[Any]]
) -> None:
    """Drawn once: the update neither drops the answer nor has it drawn again."""
    for fake in fakes:
        fake.held = (LONG, "4")
    answers = beside(generate, engine, 5, LONG)
    wait_for(lambda: num_requests(fakes) == 2 and sum(fake.running for fake in fakes) == 1)
    engine.update_weights(mini_weights(2.0), version=4)
    (short, *_), (long, *_) = answers.result(PATIENCE_SECONDS)
    assert short.versions == (VersionSpan(3, 0, 3),)
    assert long.versions == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 3))
    assert long.policy_version == 3 and long.token_versions() == [3, 4, 4]
    assert num_requests(fakes) == 2
    ((fresh, *_),) = generate(engine, 5)
    assert fresh.versions == (VersionSpan(4, 0, 3),)


def test_versions_end_where_the_answer_does(
    engine: SGLangRollout, fakes: list[FakeSGLang], beside: Callable[..., Future[Any]]
) -> None:
    """What the server drew after the end token is cut off, with its versions."""
    for fake, tokens in zip(fakes, ((9, 488, 10, 11), (488, 10, 11)), strict=True):
        fake.held, fake.tokens = (LONG, "4"), tokens
    answers = beside(generate, engine, LONG, LONG)
    wait_for(lambda: [fake.running for fake in fakes] == [1, 1])
    engine.update_weights(mini_weights(2.0), version=4)
    (longer, *_), (shorter, *_) = sorted(answers.result(PATIENCE_SECONDS), key=lambda group: -len(group[0].token_ids))
    assert (longer.token_ids, longer.versions) == ((9, 488), (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)))
    assert (shorter.token_ids, shorter.versions) == ((488,), (VersionSpan(3, 0, 1),))


@pytest.mark.parametrize("version", ["2", "4"])
def test_a_version_older_than_the_call_or_of_another_trainer_is_not_used(
    version: str, engine: SGLangRollout, fakes: list[FakeSGLang]
) -> None:
    for fake in fakes:
        fake.version = version
    with pytest.raises(RolloutError, match="other weights than version 3"):
        generate(engine, 5)


def test_a_version_that_was_refused_is_not_used(engine: SGLangRollout, fakes: list[FakeSGLang]) -> None:
    """Claim: after a failed update, here or in the process that this one follows, answers with its version are of no
    weights that all servers have."""
    fakes[1].refuse["/begin_weight_update"] = 1
    with pytest.raises(WeightSyncError, match="was refused"):
        engine.update_weights(mini_weights(2.0), version=4)
    for fake in fakes:
        fake.version = "4"
    with pytest.raises(RolloutError, match="other weights than version 3"):
        generate(engine, 5)
    engine.expect(4)
    assert generate(engine, 5)[0][0].policy_version == 4, "an update is under way"
    engine.follow(3)
    with pytest.raises(RolloutError, match="other weights than version 3"):
        generate(engine, 5)


def test_an_answer_that_begins_with_other_weights_is_not_used(
    engine: SGLangRollout, fakes: list[FakeSGLang], beside: Callable[..., Future[Any]]
) -> None:
    """Its last tokens are of the version in use, its first one is of an older one."""
    for fake in fakes:
        fake.version, fake.held = "2", (LONG, "3")
    answers = beside(generate, engine, LONG)
    wait_for(lambda: sum(fake.running for fake in fakes) == 1)
    for fake in fakes:
        fake.version = "3"
    ((first, *_),) = answers.result(PATIENCE_SECONDS)
    assert first.versions == (VersionSpan(3, 0, 3),)
    assert num_requests(fakes) == 2, "the first answer was used"


def test_calls_share_the_bound_on_requests_under_way(
    engine: SGLangRollout, fakes: list[FakeSGLang], beside: Callable[..., Future[Any]]
) -> None:
    """Of eight prompts in two calls four are asked, and the rest when an update has let these end."""
    for fake in fakes:
        fake.held = (LONG, "4")
    calls = [beside(generate, engine, *[LONG] * 4) for _ in range(2)]
    wait_for(lambda: sum(fake.running for fake in fakes) == 4)
    engine.update_weights(mini_weights(2.0), version=4)
    assert [len(call.result(PATIENCE_SECONDS)) for call in calls] == [4, 4]
    assert sum(fake.most_running for fake in fakes) == 4


def test_closing_ends_what_is_being_generated(
    engine: SGLangRollout, fakes: list[FakeSGLang], beside: Callable[..., Future[Any]]
) -> None:
    """The servers are told, so that they do not go on, and the other thread does not wait for its answer."""
    for fake in fakes:
        fake.held = (LONG, "never")
    answers = beside(generate, engine, LONG)
    wait_for(lambda: num_requests(fakes) == 1)
    engine.close()
    with pytest.raises(RolloutError, match="closed while it was being answered"):
        answers.result(PATIENCE_SECONDS)
    assert all("/abort_request" in fake.paths() for fake in fakes)
    assert num_requests(fakes) == 1, "it was asked again"
