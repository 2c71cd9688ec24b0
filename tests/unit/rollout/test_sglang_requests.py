"""What a server's answer must be to count, and what a request says.

Oracle: the fake's samples, changed by hand in one place each. Blind to what a real server answers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.errors import RolloutError
from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.sglang.requests import BARRED, RequestFormat
from prism_megatron.types import Prompt, VersionSpan
from tests.unit.rollout.fake_sglang import FOLDER, FakeSGLang

PROMPT = Prompt("p", (5, 6, 7), (), "")
FORM = RequestFormat(
    ImagePreprocessor.from_folder(FOLDER), image_token_id=498, end_token_ids=[488], never_sampled=[498, 499]
)


def sample(number: int = 0, versions: tuple[str, str] = ("3", "4")) -> dict[str, Any]:
    """Three tokens, of which the first is of the first version."""
    body = FORM.request(PROMPT, 2, Sampling(max_new_tokens=8))
    return FakeSGLang(498).sample(number, len(PROMPT.token_ids), body, list(versions))


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    one = copy.deepcopy(sample())
    change(one)
    return one


def test_an_answer_is_its_tokens_log_probs_and_versions() -> None:
    answers = FORM.answers(PROMPT, 2, [sample(0), sample(1, ("4", "4"))])
    assert answers is not None
    first, second = answers
    assert first.token_ids == (5, 6, 488) and second.token_ids == (6, 7, 488)
    assert first.logprobs == pytest.approx([-0.005, -0.006, -0.488])
    assert first.versions == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 3))
    assert second.versions == (VersionSpan(4, 0, 3),)


def test_log_probs_are_those_of_the_whole_softmax() -> None:
    """Each of the two barred tokens has probability exp(-1) of the drawn ones' sum, and would have without the bar."""
    body = FORM.request(PROMPT, 1, Sampling(max_new_tokens=8))
    one = FakeSGLang(498, barred_logprob=-1 - BARRED).sample(0, len(PROMPT.token_ids), body, ["3", "3"])
    answers = FORM.answers(PROMPT, 1, [one])
    assert answers is not None
    share = math.log(1 + 2 * math.exp(-1))
    assert answers[0].logprobs == pytest.approx([-0.005 - share, -0.006 - share, -0.488 - share], abs=1e-6)


def test_an_answer_with_an_aborted_sample_is_none() -> None:
    """Whichever it is: half a group would be trained on as if it were whole."""
    aborted = changed(lambda one: one["meta_info"].update(finish_reason={"type": "abort"}))
    for answer in ([sample(), aborted], [aborted, sample()], [aborted, aborted]):
        assert FORM.answers(PROMPT, 2, answer) is None


def test_tokens_that_no_trainer_gave_the_weights_for_have_no_version() -> None:
    answers = FORM.answers(PROMPT, 1, [sample(0, ("default", "3"))])
    assert answers is not None and answers[0].versions is None


def logprob_of(value: float) -> Callable[[dict[str, Any]], object]:
    return lambda one: one["meta_info"]["output_token_logprobs"][1].__setitem__(0, value)


def spans(*spans: tuple[int, int]) -> Callable[[dict[str, Any]], object]:
    found = [{"version": "3", "start": start, "end": end} for start, end in spans]
    return lambda one: one["meta_info"].update(weight_versions=found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["meta_info"].update(prompt_tokens=2), "has 3 tokens and the server read 2"),
        (lambda one: one["meta_info"].update(prompt_tokens=4), "has 3 tokens and the server read 4"),
        (lambda one: one["meta_info"].update(finish_reason={"type": "tired"}), "not in the protocol.*tired"),
        (lambda one: one["meta_info"].pop("output_token_logprobs"), "not in the protocol"),
        (lambda one: one["meta_info"]["output_token_logprobs"].pop(), "2 log-probs that are not those of 3 tokens"),
        (lambda one: one["output_ids"].__setitem__(1, 9), "3 log-probs that are not those of 3 tokens"),
        (logprob_of(math.nan), "not finite"),
        (logprob_of(-math.inf), "not finite"),
        (spans((0, 2)), "do not cover 3 tokens"),
        (spans((0, 1), (2, 3)), "do not cover 3 tokens"),
        (spans((1, 3)), "do not cover 3 tokens"),
        (spans((0, 2), (1, 3)), "do not cover 3 tokens"),
        (spans(), "do not cover 3 tokens"),
    ],
)
def test_an_answer_that_is_not_to_the_prompt_is_an_error(change: Callable[..., object], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        FORM.answers(PROMPT, 2, [sample(), changed(change)])


@pytest.mark.parametrize("answer", [[], ["one"], {}, None, 3], ids=str)
def test_another_number_of_samples_is_an_error(answer: Any) -> None:
    with pytest.raises(RolloutError, match="2 samples were asked for"):
        FORM.answers(PROMPT, 2, answer)


@pytest.mark.parametrize(("temperature", "bias"), [(0.5, -BARRED / 2), (2.0, -2 * BARRED), (0.0, -BARRED)])
def test_a_request_says_how_to_sample(temperature: float, bias: float) -> None:
    """The server adds the bias of tokens that must not be drawn before it divides by the temperature."""
    body = FORM.request(PROMPT, 5, Sampling(temperature, 0.9, 7))
    asked = body["sampling_params"]
    assert body["input_ids"] == [[5, 6, 7]] and "image_data" not in body and body["return_logprob"] is True
    assert asked["logit_bias"] == {"498": bias, "499": bias} and body["token_ids_logprob"] == [498, 499]
    assert (asked["n"], asked["temperature"], asked["top_p"]) == (5, temperature, 0.9)
    assert (asked["max_new_tokens"], asked["stop_token_ids"]) == (7, [488])


def test_a_request_for_scores_asks_for_them_from_the_first_token() -> None:
    body = FORM.scoring_request(PROMPT, (8, 9))
    assert body["input_ids"] == [[5, 6, 7, 8, 9]] and body["logprob_start_len"] == 0
    assert body["sampling_params"]["temperature"] == 1.0


@pytest.mark.parametrize("tokens", [(8, 9), (9, 8), (8,)], ids=str)
def test_scores_are_those_of_the_response(tokens: tuple[int, ...]) -> None:
    """The last two entries, and of these tokens only."""
    scored = [[-0.5 * i, token, None] for i, token in enumerate((5, 6, 7, *tokens))]
    answer = [{"meta_info": {"prompt_tokens": 5, "input_token_logprobs": scored}}]
    if tokens == (8, 9):
        assert FORM.scores(PROMPT, (8, 9), answer) == (-1.5, -2.0)
    else:
        with pytest.raises(RolloutError, match="has 5 tokens and the server read 5"):
            FORM.scores(PROMPT, (8, 9), answer)
