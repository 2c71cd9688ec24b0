"""Selecting prompts: what is counted, what is kept, what a kill leaves, and what is not gone on with.

Blind spot: a kill itself, and that answers are the same again (``tests/integration/test_select_prompts.py``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands.select_prompts import parse
from prism_megatron.config.stages.select_prompts import SelectPromptsConfig
from prism_megatron.data.selection import digest_of, read_selection
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.run.alone import alone_in
from prism_megatron.stages.select_prompts.ask import Batches
from prism_megatron.stages.select_prompts.build import select_on
from prism_megatron.stages.select_prompts.choice import Keep, histogram_of, summary_of, table_of, write_choice
from prism_megatron.stages.select_prompts.identity import check_same_asked, settle
from prism_megatron.stages.select_prompts.pass_rates import PassRate, PassRateFile, pass_rate_of
from tests.unit.stages.tiny_rewards import example, group, rewarded

DATA = {"flag": "data", "count": 3, "digest": "d", "batch_size": 32}


def rates_of(*passes: int, rollouts: int = 10) -> list[PassRate]:
    return [PassRate(f"q-{i}", n, rollouts, rollouts - 1, 7 * rollouts) for i, n in enumerate(passes)]


def test_answers_are_counted_as_the_stage_counts_them() -> None:
    """Claim: right ones are those with a reward for the answer: a right one in another form is none."""
    one = group([True, False, True], lengths=[2, 3, 5])
    rewards = [rewarded(True), rewarded(False), rewarded(True, valid=False)]
    assert pass_rate_of(one.group, rewards) == PassRate("q", passes=1, rollouts=3, format=2, tokens=10)
    assert pass_rate_of(one.group, one.rewards) == PassRate("q", passes=2, rollouts=3, format=3, tokens=10)


@pytest.mark.parametrize("rollouts", [5, 10, 15, 20, 40])
def test_both_bounds_are_kept(rollouts: int) -> None:
    keep = Keep(0.2, 0.8)
    kept = [n for n in range(rollouts + 1) if keep.takes(PassRate("q", n, rollouts, 0, 0).share)]
    assert kept == list(range(rollouts // 5, rollouts * 4 // 5 + 1))


def test_the_histogram_has_every_prompt_once() -> None:
    rates = rates_of(0, 2, 2, 10, 8, 9)
    rows = histogram_of(rates, 10, Keep(0.2, 0.8))
    assert [row["prompts"] for row in rows] == [1, 0, 2, 0, 0, 0, 0, 0, 1, 1, 1]
    assert [row["passes"] for row in rows if row["kept"]] == list(range(2, 9))


def test_the_summary_says_what_was_found() -> None:
    summary = summary_of(rates_of(0, 2, 10), 10, Keep(0.2, 0.8), {"kept": 3})
    assert (summary["prompts"], summary["selected"], summary["accuracy"]) == (3, 1, 12 / 30)
    assert (summary["valid_share"], summary["tokens_per_answer"], summary["data"]) == (0.9, 7.0, {"kept": 3})
    table = table_of(summary)
    assert table[1] == f"   0 of 10      1 {'.' * 40}" and table[3] == f"   2 of 10      1 {'#' * 40}"
    assert table[2] == "   1 of 10      0"
    assert table[-1].startswith("1 of 3 prompts have a pass rate from 0.2 to 0.8; of all answers 0.400 are right")


def test_the_file_of_the_kept_is_one_that_can_be_read(tmp_path: Path) -> None:
    rates = rates_of(0, 2, 5, 9)
    records = [example(rate.id).record for rate in rates]
    whole = [replace(record, answer=str(i)) for i, record in enumerate(records) if record is not None]
    keep = Keep(0.2, 0.8)
    write_choice(tmp_path, rates, whole, keep, summary_of(rates, 10, keep, {}))
    selection = read_selection(tmp_path / "selected.jsonl")
    assert {name: line.digest for name, line in selection.lines.items()} == {
        "q-1": digest_of(whole[1]),
        "q-2": digest_of(whole[2]),
    }
    assert json.loads((tmp_path / "selected.jsonl").read_text().splitlines()[0])["pass_rate"] == 0.2
    assert json.loads((tmp_path / "summary.json").read_text())["selected"] == 2


def test_what_whole_batches_have_is_not_asked_again(tmp_path: Path) -> None:
    """Claim: after a kill at any byte, whole batches are kept and the file ends where the next one begins."""
    rates = rates_of(1, 2, 3, 4, 5)
    file = PassRateFile(tmp_path / "rates.jsonl", [rate.id for rate in rates], 2)
    assert file.reopen() == []
    for start in (0, 2, 4):
        file.append(rates[start : start + 2])
    data = file.path.read_bytes()
    assert [json.loads(line) for line in data.splitlines()] == [asdict(rate) for rate in rates]
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        file.path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        whole = whole if whole == 5 else whole - whole % 2
        assert file.reopen() == rates[:whole]
        assert file.path.read_bytes() == data[: ends[whole - 1] if whole else 0]
    file.path.write_bytes(data[: ends[1]] + b"\0" * 30)
    assert file.reopen() == rates[:2]


def test_lines_of_others_are_refused(tmp_path: Path) -> None:
    file = PassRateFile(tmp_path / "rates.jsonl", ["a", "b"], 1)
    line = asdict(PassRate("a", 1, 4, 4, 9))
    for changes, words in (
        ({"id": "b"}, "rates.jsonl:1: field id: 'b' is not the prompt of its place"),
        ({"passes": -1}, "rates.jsonl:1: field passes: a count expected"),
        ({"tokens": 1.5}, "rates.jsonl:1: field tokens: a count expected"),
    ):
        file.path.write_text(json.dumps({**line, **changes}) + "\n")
        with pytest.raises(DataError, match=words):
            file.reopen()


def test_the_last_batch_may_be_short() -> None:
    batches = Batches(lambda i: example(f"q-{i}"), total=5, size=2)
    assert batches.count == 3
    assert [[one.prompt.id for one in batches.batch(i)] for i in range(3)] == [["q-0", "q-1"], ["q-2", "q-3"], ["q-4"]]


def asked(tmp_path: Path, *flags: str) -> SelectPromptsConfig:
    (tmp_path / "set").mkdir(exist_ok=True)
    return parse(["--model", "policy", "--data", str(tmp_path / "set"), "--output", str(tmp_path / "out"), *flags])


def test_a_folder_is_gone_on_with_as_it_was_begun(tmp_path: Path) -> None:
    """Claim: other policies, draws, records and rewards are refused, by their flags; bounds and ranks may differ."""
    config = asked(tmp_path)
    check_same_asked(config)
    (tmp_path / "out").mkdir()
    check_same_asked(config)
    settle(tmp_path / "out", config, policy=Path("policy"), data=DATA)
    for flags in (("--keep-from", "0.1", "--keep-to", "1"), ("--ranks", "2", "--reward-workers", "4")):
        check_same_asked(asked(tmp_path, *flags))
        settle(tmp_path / "out", asked(tmp_path, *flags), policy=Path("policy"), data=DATA)
    (tmp_path / "other").mkdir()
    for flag, value in (
        ("--model", "another"),
        ("--data", str(tmp_path / "other")),
        ("--rollouts-per-prompt", "8"),
        ("--prompts-per-step", "8"),
        ("--temperature", "0.7"),
        ("--seed", "3"),
        ("--reward-preset", "sum"),
        ("--reward", "a.b:c"),
    ):
        with pytest.raises(
            ConfigError, match=f"out was begun otherwise: {flag} was .* Leave {flag} as before"
        ) as caught:
            check_same_asked(asked(tmp_path, flag, value))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": Path("runs/x/step_2")}, "was begun with the policy policy, and --model now is runs/x/step_2"),
        ({"data": {**DATA, "digest": "e"}}, "other records of --data: there are as many examples as before"),
        ({"data": {**DATA, "count": 4}}, "other records of --data: there were 3 examples and are 4"),
    ],
)
def test_what_a_name_stands_for_may_not_change(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "out").mkdir()
    begun: dict[str, Any] = {"policy": Path("policy"), "data": DATA}
    settle(tmp_path / "out", asked(tmp_path), **begun)
    with pytest.raises(ConfigError, match=words):
        settle(tmp_path / "out", asked(tmp_path), **{**begun, **changes})


def test_the_folder_of_a_run_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"--output .*out is a run's folder"):
        check_same_asked(asked(tmp_path))


def test_a_selection_is_alone_in_its_folder(world: World, tmp_path: Path) -> None:
    """Claim: and looks at what another one has begun there once that has ended."""
    config = asked(tmp_path)
    with (
        alone_in(tmp_path / "out", command="another"),
        pytest.raises(ConfigError, match="another prism-select-prompts"),
    ):
        select_on(world, config)
    settle(tmp_path / "out", asked(tmp_path, "--seed", "3"), policy=Path("policy"), data=DATA)
    with pytest.raises(ConfigError, match="--seed was 3 and is 42"):
        select_on(world, config)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for flags, words in (
        (("--model", "None"), "--model is needed"),
        (("--data", "None"), "--data is needed"),
        (("--format-sft", "3"), "--format-sft 3 trains, and here a policy only answers"),
        (("--keep-from", "0.9"), "--keep-from 0.9 is more than --keep-to 0.8"),
        (("--keep-to", "1.5"), "--keep-to 1.5 must be at least 0 and at most 1"),
        (("--rollout-ahead", "1"), "--rollout-ahead 1 generates"),
    ):
        with pytest.raises(ConfigError, match=words):
            asked(tmp_path, *flags)
