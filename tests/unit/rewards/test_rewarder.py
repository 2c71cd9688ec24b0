"""From responses to rewards: the form, the presets, and functions of users."""

from __future__ import annotations

import importlib

import pytest

from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.data.segments import response_text
from prism_megatron.errors import RewardError
from prism_megatron.rewards.format import read_response
from prism_megatron.rewards.presets import PRESETS, combine
from prism_megatron.rewards.rewarder import Rewarded, Rewarder, Sampled
from prism_megatron.rewards.user import RewardInput

FUNCTIONS = f"{__package__ or 'tests.unit.rewards'}.user_rewards"


def sampled(answer: str, *, gold: str = "3", valid: bool = True, ended: bool = True) -> Sampled:
    response = response_text("a circle", "I count.", answer)
    return Sampled("q7", "How many?", gold, response if valid else response.replace("caption>", "captain>"), ended)


def rewarded(config: RewardsConfig, *group: Sampled) -> list[Rewarded]:
    with Rewarder(config) as rewarder:
        return rewarder.submit(group).result(timeout=60)


@pytest.mark.parametrize(
    ("preset", "wanted"), [("prism", [1.0, 0.2, 0.0, 0.0, 0.0, 1.0]), ("sum", [2.0, 1.0, 1.0, 0.0, 1.0, 2.0])]
)
def test_presets(preset: str, wanted: list[float]) -> None:
    """Claim: right, wrong, right and wrong without the form, right but cut off, and algebra."""
    group = [
        sampled("3"),
        sampled("4"),
        sampled("3", valid=False),
        sampled("4", valid=False),
        sampled("3", ended=False),
        sampled(r"\sqrt{8}", gold=r"2\sqrt{2}"),
    ]
    results = rewarded(RewardsConfig(reward_preset=preset), *group)  # type: ignore[arg-type]
    assert [result.reward.total for result in results] == wanted
    assert [result.reward.components["format"] for result in results] == [1, 1, 0, 0, 0, 1]
    right = [1, 0, preset == "sum", 0, preset == "sum", 1]
    assert [result.reward.components["accuracy"] for result in results] == right, "as it is normalised, before weights"
    assert results[2].read.problem == "<caption> appears 0 times"


def test_weights_are_those_of_the_sources() -> None:
    assert combine(PRESETS["prism"], name="accuracy", answer=1.0, valid=True).weights == {
        "accuracy": 0.8,
        "format": 0.2,
    }
    assert combine(PRESETS["sum"], name="accuracy", answer=1.0, valid=True).weights == {"accuracy": 1.0, "format": 1.0}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>3</answer>", "3"),
        ("<answer>3</answer><answer>4</answer>", ""),
        ("</answer><answer>3", ""),
        ("3", ""),
        ("<answer>3", ""),
        ("<caption>a</caption><think>b</think><answer>3</answer> more", "3"),
        ("<caption>a</caption><think>b <answer>4</answer></think><answer>3</answer>", ""),
        ("<caption>a</caption><caption>a</caption><think>b</think><answer>3</answer>", "3"),
    ],
)
def test_responses_of_another_form(response: str, answer: str) -> None:
    read = read_response(response)
    assert not read.valid
    assert read.problem
    assert read.answer == answer


def test_the_lax_rule_is_the_released_one() -> None:
    doubled = "<caption>a</caption><caption>b</caption><think>c</think><answer>3</answer>"
    assert not read_response(doubled).valid
    assert read_response(doubled, strict=False).valid
    assert read_response("<caption>a</caption>\n<thought>b</thought>\n<answer>3</answer>\n").valid
    assert not read_response("<caption>a</caption><think>b\ud800</think><answer> </answer>").valid


def test_groups_come_back_in_order_while_others_are_under_way() -> None:
    with Rewarder(RewardsConfig()) as rewarder:
        hard = [rewarder.submit([sampled(rf"\sqrt{{{n}}}", gold=r"2\sqrt{2}") for n in (8, 9, 8)]) for _ in range(3)]
        easy = rewarder.submit([sampled("3")])
        assert easy.done(), "what needs no worker waits for none"
        assert [[one.verdict.right for one in group.result(timeout=60)] for group in hard] == [[True, False, True]] * 3
        assert rewarder.submit([]).result(timeout=1) == []
        assert rewarder.checker.counts["by worker"] == 2, "equal pairs are asked once"


@pytest.mark.parametrize(("name", "wanted"), [("equal", [1.0, 0.2, 0.0]), ("yes", [1.0, 1.0, 0.0])])
def test_a_function_takes_the_place_of_rightness(name: str, wanted: list[float]) -> None:
    results = rewarded(
        RewardsConfig(reward=f"{FUNCTIONS}:{name}"), sampled("3"), sampled("4"), sampled("3", valid=False)
    )
    assert [result.reward.total for result in results] == wanted
    assert set(results[0].reward.components) == {"reward", "format"}


def test_the_example() -> None:
    results = rewarded(
        RewardsConfig(reward="examples.rewards.short_answers:reward", reward_preset="sum"), sampled("3.0"), sampled("4")
    )
    right, wrong = (result.reward.components["reward"] for result in results)
    assert 0.9 < right < 1.0
    assert wrong == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short_answers", "write it as package.module:function"),
        ("a b:c", "write it as package.module:function"),
        ("no_such_package.module:reward", "it is not found; install it"),
        (f"{FUNCTIONS}:absent", "absent is not in the module"),
        (f"{FUNCTIONS}:not_a_function", "not_a_function is not a function"),
    ],
)
def test_no_such_function_is_told_before_the_first_rollout(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        Rewarder(RewardsConfig(reward=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"on record q7 it raised KeyError: 'q7' \(.*user_rewards.py:\d+\)"),
        ("text", "on record q7 it returned str; it has to return a number"),
        ("nan", "on record q7 it returned nan; it has to return a finite number"),
        ("huge", "on record q7 it returned inf; it has to return a finite number"),
    ],
)
def test_a_function_that_fails_is_one_error_that_names_the_record(name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        rewarded(RewardsConfig(reward=f"{FUNCTIONS}:{name}"), sampled("3"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sleeps", "spins", "exits"])
def test_a_function_that_hangs_is_ended_and_gives_nothing(name: str) -> None:
    said: list[str] = []
    config = RewardsConfig(reward=f"{FUNCTIONS}:{name}", reward_seconds=1.0, reward_workers=1)
    with Rewarder(config, say=said.append) as rewarder:
        group = [sampled("hang"), sampled("3"), sampled("hang"), sampled("4")]
        results = rewarder.submit(group).result(timeout=60)
        assert rewarder.checker.counts["calls ended"] == 2
    assert [result.reward.components["reward"] for result in results] == [0.0, 1.0, 0.0, 1.0]
    assert [result.verdict.killed for result in results] == [True, False, True, False]
    (line,) = said
    assert "on record q7 was ended after" in line


def test_inputs_are_as_documented() -> None:
    assert RewardInput.__doc__ is not None
    sample = eval(RewardInput.__doc__.partition("``")[2].partition("``")[0], {"RewardInput": RewardInput})
    assert sample.answer == sample.gold
    assert importlib.import_module("examples.rewards.short_answers").reward(sample) > 0.9
