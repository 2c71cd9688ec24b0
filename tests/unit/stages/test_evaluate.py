"""Evaluation: which questions are asked and how they are keyed, verdicts, what a folder is gone on with, and the flags.

Blind spot: a kill itself, and that answers are the same again (``tests/integration/test_evaluate.py``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.commands import evaluate
from prism_megatron.commands.evaluate import parse
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.config.tools.evaluate import EvaluateConfig
from prism_megatron.data.records import in_part, read_records
from prism_megatron.errors import ConfigError, DataError, PrismError, RunStopped
from prism_megatron.evaluation.benchmark.answers import Answered, Item
from prism_megatron.evaluation.benchmark.folder import BEGUN, SUMMARY
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.stages.evaluate.identity import begun_unless_refused, check_same_asked, identity_of, settle
from prism_megatron.stages.evaluate.policy import check_room
from prism_megatron.stages.evaluate.questions import Batch, Question, batches_of, digest_of, read_questions
from prism_megatron.stages.evaluate.result import write_result
from prism_megatron.stages.evaluate.said import Said, judged, until_it_goes_on
from tests.integration.test_align_records import write_records

POLICY = MINI_FOLDER / "policy"
FORM = "<caption>\nx\n</caption>\n<think>\ny\n</think>\n<answer>{}</answer>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluate") / "made"
    write_records(made, 40)
    return made


def asked(folder: Path, *, limit: int | None = None, scenes: int = 0) -> list[Question]:
    return read_questions([folder], part="all", limit=limit, scenes=scenes, seed=7)


def test_questions_are_those_of_the_sets_in_order_then_scenes(folder: Path) -> None:
    found = asked(folder, limit=3, scenes=2)
    assert [(one.item.set, one.item.id) for one in found] == [
        ("made", "made-0"),
        ("made", "made-1"),
        ("made", "made-2"),
        ("scenes", "scene-heldout-7-0"),
        ("scenes", "scene-heldout-7-1"),
    ]
    assert found[0].answer_type == found[0].item.kind == "text"
    assert found[3].scene is not None and found[3].item.kind == found[3].scene.question.kind


def test_scenes_are_those_of_the_named_world() -> None:
    """Claim: and their ids, by which answers are told apart, say so."""
    found = read_questions([], part="all", limit=None, scenes=20, seed=7, mini="drift")
    assert {one.scene.world for one in found if one.scene is not None} == {"drift"}
    assert not {one.item.id for one in found} & {f"scene-heldout-7-{index}" for index in range(20)}


def test_sets_for_evaluation_only_are_asked(shared_dir: Path) -> None:
    """Claim: here alone; training refuses them (``tests/unit/data/test_records.py``)."""
    found = read_questions([shared_dir / "data" / "mathvision_testmini"], part="all", limit=None, scenes=0, seed=7)
    assert len(found) == 304
    with pytest.raises(DataError, match="for evaluation only"):
        read_records(shared_dir / "data" / "mathvision_testmini", purpose="train")


def test_the_validation_part_is_what_training_holds_out(folder: Path) -> None:
    records = read_records(folder, purpose="evaluate")
    wanted = [one.id for one in records if in_part(one, "validation", validation_share=0.1)]
    found = read_questions([folder], part="validation", limit=None, scenes=0, seed=7)
    assert [one.item.id for one in found] == wanted and 0 < len(wanted) < 40


def test_a_record_may_say_how_difficult_it_is(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "set")
    path = tmp_path / "set" / "data.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), "difficulty": "4"}), *rest]))
    found = asked(tmp_path / "set")
    assert [one.item.difficulty for one in found[:2]] == ["4", None]
    path.write_text(json.dumps({**json.loads(first), "difficulty": 4}))
    with pytest.raises(DataError, match="field difficulty: text or null expected, and it is a number"):
        asked(tmp_path / "set")


def test_a_digest_is_of_question_answer_and_image(folder: Path, tmp_path: Path) -> None:
    """Claim: each of them changes it, and nothing else of a line does."""
    before = asked(folder, limit=1)
    for key, value, changes in (("question", "How?", True), ("answer", "99", True), ("caption", "other", False)):
        target = tmp_path / key
        shutil.copytree(folder, target)
        lines = (target / "data.jsonl").read_text().splitlines()
        lines[0] = json.dumps({**json.loads(lines[0]), key: value})
        (target / "data.jsonl").write_text("\n".join(lines))
        after = asked(target, limit=1)
        assert (after[0].item.digest != before[0].item.digest) == changes, key
    shutil.copytree(folder, tmp_path / "made")
    shutil.copy(folder / "images" / "1.png", tmp_path / "made" / "images" / "0.png")
    assert digest_of(asked(tmp_path / "made", limit=1)) != digest_of(before)


def test_draws_are_keyed_by_set_and_batch_alone(folder: Path) -> None:
    """Claim: neither another set, nor a limit, nor what was asked before changes them; modes have keys of their own."""
    keys = {(one.questions[0].item.id, mode): one.key(mode) for one in batches_of(asked(folder, scenes=20), 16)
            for mode in ("greedy", "sampled")}  # fmt: skip
    assert len(set(keys.values())) == len(keys) == 2 * (3 + 2)
    alone = batches_of(read_questions([], part="all", limit=None, scenes=20, seed=7), 16)
    assert [one.key("sampled") for one in alone] == [keys[one.questions[0].item.id, "sampled"] for one in alone]
    few = batches_of(asked(folder, limit=20), 16)
    assert [one.key("sampled") for one in few] == [keys[f"made-{i}", "sampled"] for i in (0, 16)]
    assert [len(one.questions) for one in few] == [16, 4]


def test_no_batch_has_questions_of_two_sets(folder: Path) -> None:
    found = batches_of(asked(folder, limit=5, scenes=5), 4)
    assert [(one.number, len(one.questions), one.questions[0].item.set) for one in found] == [
        (0, 4, "made"), (1, 1, "made"), (0, 4, "scenes"), (1, 1, "scenes"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rewarder() -> Iterator[Rewarder]:
    with Rewarder(RewardsConfig()) as made:
        yield made


def test_verdicts_become_lines(rewarder: Rewarder) -> None:
    """Claim: right in the asked form counts; right in another does not; a failure is neither, and keeps its place."""
    question = Question(Item("s", "q", "d", "integer", "s"), "How many?", "3", "integer")
    said = [
        Said(FORM.format(" 3 "), ended=True, tokens=30),
        Said("<answer>3</answer>", ended=True, tokens=5),
        Said(failure="HTTP 400"),
        Said(FORM.format("4"), ended=True, tokens=30),
        Said(FORM.format("3"), ended=False, truncated=True, tokens=96),
    ]
    lines = judged(Batch(0, [question]), [said], rewarder)
    assert [(one.mode, one.sample) for one in lines] == [("greedy", 0), *(("sampled", i) for i in range(4))]
    assert [one.counts for one in lines] == [True, False, False, False, False]
    assert [one.right for one in lines] == [True, True, False, False, True]
    assert [one.valid for one in lines] == [True, False, False, True, False]
    assert [one.answer for one in lines] == ["3", "3", "", "4", "3"]
    assert [one.truncated for one in lines] == [False, False, False, False, True]
    assert [one.failure for one in lines] == ["", "", "HTTP 400", "", ""]
    assert lines[1].problem.startswith("<caption> appears 0 times") and lines[0].kind == "number"


@pytest.mark.parametrize(
    ("tail", "kept"), [("", ""), ("\n\n", "\n\n"), ("\n x y", "\n x"), ("\ufffd", "\ufffd"), ("<", "<")]
)
def test_a_response_is_kept_until_it_goes_on(tail: str, kept: str) -> None:
    assert until_it_goes_on("<answer>3</answer>" + tail) == "<answer>3</answer>" + kept


def command(tmp_path: Path, folder: Path, *flags: str) -> EvaluateConfig:
    return parse([str(POLICY), "--data", str(folder), "--output", str(tmp_path / "out"), *flags])


def test_a_folder_is_gone_on_with_as_it_was_begun(tmp_path: Path, folder: Path) -> None:
    """Claim: another model, question or draw is refused, by its flag; what concerns this try alone may differ."""
    config = command(tmp_path, folder)
    check_same_asked(config)
    (tmp_path / "out").mkdir()
    begun = {"model": identity_of(POLICY), "questions": "d"}
    settle(tmp_path / "out", config, **begun)  # type: ignore[arg-type]
    # Nothing is answered yet, and it is what it is all the same.
    for flags in (("--ranks", "2", "--shown", "3"), ("--against", str(tmp_path)), ("--requests-at-once", "2")):
        check_same_asked(command(tmp_path, folder, *flags))
        settle(tmp_path / "out", command(tmp_path, folder, *flags), **begun)  # type: ignore[arg-type]
    for flag, value in (
        ("--scenes", "3"),
        ("--limit", "3"),
        ("--samples", "3"),
        ("--temperature", "0.7"),
        ("--seed", "3"),
        ("--system-prompt", "None"),
        ("--max-response-tokens", "9"),
        ("--questions-at-once", "9"),
        ("--reward-preset", "sum"),
        ("--part", "validation"),
    ):
        with pytest.raises(ConfigError, match=f"was begun otherwise: {flag} was .* Leave {flag} as before") as caught:
            check_same_asked(command(tmp_path, folder, flag, value))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"Leave MODEL as before"):
        check_same_asked(replace(config, model="other"))
    for other, words in (
        ({"model": {"name": "x", "digest": ""}}, "was begun with the model"),
        ({"questions": "e"}, "other questions, answers or images"),
    ):
        with pytest.raises(ConfigError, match=words):
            settle(tmp_path / "out", config, **{**begun, **other})  # type: ignore[arg-type]
    (tmp_path / "out" / BEGUN).write_text("{}")
    with pytest.raises(ConfigError, match=r"begun.json: config is missing"):
        check_same_asked(config)


def test_what_was_refused_before_an_answer_may_be_asked_otherwise(tmp_path: Path, folder: Path) -> None:
    """Claim: in the same folder; after an answer, or where it was stopped, it may not. Blind to a kill, which runs
    nothing here (``tests/integration/test_evaluate.py``)."""
    out, other = tmp_path / "out", command(tmp_path, folder, "--limit", "9")
    out.mkdir()

    def ended_by(error: PrismError) -> None:
        settle(out, command(tmp_path, folder), model={"name": "m"}, questions="d")
        with pytest.raises(type(error)), begun_unless_refused(out):
            raise error

    ended_by(ConfigError("refused"))
    check_same_asked(other)
    ended_by(RunStopped("stopped"))
    with pytest.raises(ConfigError, match="--limit was None and is 9"):
        check_same_asked(other)
    (out / "answers.jsonl").write_text("{}\n")
    ended_by(ConfigError("refused"))
    with pytest.raises(ConfigError, match="--limit was None and is 9"):
        check_same_asked(other)


def test_answers_of_nobody_are_not_gone_on_with(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "answers.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"holds answers and no begun.json: .* begin in another --output"):
        settle(out, command(tmp_path, folder), model={"name": "m"}, questions="d")


def test_replaced_weights_are_another_model(tmp_path: Path) -> None:
    """Claim: of the same size under the same name; a copy is the same."""
    shutil.copytree(POLICY, tmp_path / "a")
    shutil.copytree(POLICY, tmp_path / "b")
    assert identity_of(tmp_path / "a")["digest"] == identity_of(tmp_path / "b")["digest"]
    path = tmp_path / "b" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert identity_of(tmp_path / "a")["digest"] != identity_of(tmp_path / "b")["digest"]


def test_the_folder_of_a_run_is_not_taken(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"--output .*out is a run's folder"):
        check_same_asked(command(tmp_path, folder))


URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--scenes", "2"], "name what to evaluate"),
        ([str(POLICY)], "name what to ask: --data"),
        ([str(POLICY), "--data", "no/such"], "--data no/such is not a folder"),
        ([str(POLICY), "--scenes", "2", "--served-model", "x"], "are of an endpoint, and .*policy is none"),
        ([URL, "--scenes", "2"], "--served-model is needed"),
        ([URL, "--scenes", "2", "--served-model", "x", "--ranks", "2"], "asked by one process"),
        ([URL, "--scenes", "2", "--served-model", "x", "--max-pixels", "9"], "need --served-files"),
        ([URL, "--scenes", "2", "--served-model", "x", "--request-fields", "[1]"], "must be an object"),
        ([URL, "--scenes", "2", "--served-model", "x", "--request-fields", "{"], "is no JSON"),
        ([URL, "--scenes", "2", "--served-model", "x", "--request-fields", '{"n": 2}'], "n is not for it to say"),
        ([str(POLICY), "--scenes", "2", "--against", URL], "evaluate an endpoint by itself"),
        (["http://me:key@host/v1", "--scenes", "2", "--served-model", "x"], "a key stands in PRISM_EVALUATE_API_KEY"),
        (["http://host/v1?key=x", "--scenes", "2", "--served-model", "x"], "must be a host and a path alone"),
        (["http://host:x/v1", "--scenes", "2", "--served-model", "x"], "is no URL"),
        ([str(POLICY), "--scenes", "2", "--temperature", "0"], "--temperature 0 must be above 0"),
    ],
)
def test_what_cannot_work_is_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse(words)
    assert "\n" not in str(caught.value) and "key@" not in str(caught.value)


def test_two_sets_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "scenes").mkdir()
    with pytest.raises(ConfigError, match="another set is called 'made' too"):
        parse([str(POLICY), "--data", str(folder), str(tmp_path / "made")])
    with pytest.raises(ConfigError, match="another set is called 'scenes' too"):
        parse([str(POLICY), "--scenes", "2", "--data", str(tmp_path / "scenes")])


def test_models_that_are_none_are_told_before_anything_starts(tmp_path: Path) -> None:
    assert evaluate.main(["no/such/model", "--scenes", "2"]) == 2
    for other in (str(tmp_path), "no/such/model", "x" * 999):
        with pytest.raises(ConfigError, match=r"--against .*, or the --output of a finished evaluation"):
            evaluate.check(parse([str(POLICY), "--scenes", "2", "--against", other]))
    evaluate.check(parse([str(POLICY), "--scenes", "2", "--against", str(MINI_FOLDER / "base")]))
    with pytest.raises(ConfigError, match="--served-files no/such is not a folder"):
        evaluate.check(parse([URL, "--scenes", "2", "--served-model", "x", "--served-files", "no/such"]))


def test_an_answer_has_to_fit_the_model(tmp_path: Path, folder: Path) -> None:
    check_room(command(tmp_path, folder, "--max-response-tokens", "2048"), POLICY)
    with pytest.raises(ConfigError, match="make 8192 tokens, and the model allows 4096; lower one of them"):
        check_room(command(tmp_path, folder), POLICY)


def test_the_result_is_written_whole_and_compared(tmp_path: Path, folder: Path, rewarder: Rewarder) -> None:
    """Claim: the files hold the same again, and a comparison names rule, verdict and what else differs."""
    from prism_megatron.evaluation.benchmark.folder import Evaluated

    questions = asked(folder, limit=20)
    config = command(tmp_path, folder, "--limit", "20", "--shown", "3")

    def answers(right: bool) -> list[Answered]:
        said = [[Said(FORM.format(one.gold if right else "none"), ended=True, tokens=9)] for one in questions]
        return judged(Batch(0, questions), said, rewarder)

    out = tmp_path / "out"
    out.mkdir()
    base = Evaluated(tmp_path / "base", {"model": "other", "temperature": 0.5}, answers(False))
    result = write_result(out, questions, answers(True), config, base)
    (one,) = result.summary["against"]["measures"]
    assert (one["measure"], one["verdict"], one["gained"], one["lost"]) == ("greedy/accuracy", "better", 20, 0)
    assert any("better" in text for text in result.lines) and any("rule: " in text for text in result.lines)
    notes = result.summary["against"]["notes"]
    assert any("--temperature was 0.5 and is 1" in note for note in notes)
    assert not any("--model" in note for note in notes)
    first = {name: (out / name).read_bytes() for name in (SUMMARY, "report.html")}
    assert (out / "report.html").read_text().count("<article>") == 3
    write_result(out, questions, answers(True), config, base)
    assert first == {name: (out / name).read_bytes() for name in first}
