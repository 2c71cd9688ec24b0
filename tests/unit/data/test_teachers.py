"""The faithful teacher never errs; the others err at their stated rates; all are deterministic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prism_megatron.config.architecture.model import FAITHFUL_SHARE
from prism_megatron.data.scenes import Kind, Question, Scene, make_scene
from prism_megatron.data.segments import parse_response, response_text
from prism_megatron.data.teachers import SLOPPY_TEACHER, Teacher, equation, required_steps, write
from prism_megatron.evaluation.scenes import SceneJudgement, judge

SCENES = [make_scene("sft", seed=0, index=index) for index in range(800)]


def judgements(teacher: Teacher, faithful_share: float = 0.0) -> list[SceneJudgement]:
    return [judge(s, response_text(*write(s, teacher, faithful_share=faithful_share, seed=1))) for s in SCENES]


def mean(values: list[bool] | list[float]) -> float:
    return sum(values) / len(values)


def test_the_faithful_teacher_is_perfect() -> None:
    for judged in judgements("faithful"):
        assert judged.format_valid
        assert judged.caption_exact and judged.reasoning_exact and judged.answer_right
        assert judged.item_precision == judged.item_recall == judged.step_validity == 1.0


@pytest.mark.parametrize("teacher", ["mild", "sloppy"])
def test_writings_are_valid_and_depend_on_the_key_alone(teacher: Teacher) -> None:
    for scene in SCENES[:100]:
        writing = write(scene, teacher, seed=5)
        assert writing == write(scene, teacher, seed=5)
        assert not isinstance(parse_response(response_text(*writing).encode()), str)
    assert any(write(s, teacher, seed=5) != write(s, teacher, seed=6) for s in SCENES[:100])


def test_the_sloppy_teacher_errs_in_its_own_ways() -> None:
    """Claim: shares of each habit lie within 0.06 of their setting (about three standard errors)."""
    dropped, threes, skipped = [], [], []
    for scene in SCENES:
        writing = write(scene, "sloppy", seed=1)
        lines = writing.caption.splitlines()
        if len(scene.counts) == 3:
            dropped.append(len(lines) == 2)
        kind, count = scene.counts[0]
        if count == 3:
            threes.append(lines[0] == f"- {kind}: 2")
        if len(required_steps(scene)) > 1:
            skipped.append(len(writing.think.splitlines()) == 1)
    assert mean(dropped) == pytest.approx(0.75, abs=0.06)
    assert mean(threes) == pytest.approx(0.90, abs=0.06)
    assert mean(skipped) == pytest.approx(0.75, abs=0.06)


def test_no_teacher_lists_what_is_not_there() -> None:
    """Claim: slips are by one, captions have at least one of each item, and the sloppy teacher drops none of two."""
    seen = set()
    for scene in SCENES:
        mild, sloppy = (write(scene, teacher, seed=1) for teacher in ("mild", "sloppy"))
        seen |= {int(line.rpartition(" ")[2]) for line in mild.caption.splitlines()}
        if len(scene.counts) == 2:
            assert len(sloppy.caption.splitlines()) == 2
    assert seen == {1, 2, 3, 4}


def test_quality_of_the_teachers_is_that_of_the_prototype() -> None:
    """Claim: the mild teacher's shares match the prototype's table (0.82, 0.60, 0.81) within 0.07."""
    mild = judgements("mild")
    assert mean([j.item_precision for j in mild if j.item_precision is not None]) == pytest.approx(0.82, abs=0.07)
    assert mean([j.item_recall for j in mild]) == pytest.approx(0.60, abs=0.07)
    assert mean([j.answer_right for j in mild]) == pytest.approx(0.81, abs=0.07)
    sloppy = judgements("sloppy")
    assert mean([j.caption_exact for j in sloppy]) < 0.35
    assert mean([j.answer_right for j in sloppy]) > 0.7


def test_equations_are_written_as_they_are_read() -> None:
    """By hand, because what judges reasoning writes its equations with the same function."""
    written = [equation("comparison", counts) for counts in ((2, 1), (1, 2), (2, 2))]
    written += [equation("difference", (3, 1)), equation("sum3", (1, 2, 3)), equation("sum2", (1, 2), result="4")]
    assert written == ["2>1", "1<2", "2=2", "3-1=2", "1+2+3=6", "1+2=4"]


def test_faithful_share_mixes_in_the_faithful_teacher() -> None:
    exact = mean([write(s, "sloppy", faithful_share=0.5, seed=2) == write(s, "faithful") for s in SCENES])
    alone = mean([write(s, "sloppy", seed=2) == write(s, "faithful") for s in SCENES])
    assert exact == pytest.approx(0.5 + 0.5 * alone, abs=0.06)


def test_the_misreading_teacher_exchanges_one_and_three_everywhere() -> None:
    """Claim: caption, statements, equation and answer follow from counts in which 1 is 3 and 3 is 1; 0 and 2 stay."""
    red, blue, green = Kind("red", "circle"), Kind("blue", "square"), Kind("green", "circle")
    scene = Scene("sft", 0, 0, ((red, 3), (green, 2), (blue, 1)), Question("sum3", (blue, green, red)), ())
    assert write(scene, "misreading") == (
        "- red circle: 1\n- green circle: 2\n- blue square: 3",
        "blue square: 3\ngreen circle: 2\nred circle: 1\n3+2+1=6",
        "6",
    )
    asked = replace(scene, question=Question("comparison", (red, blue)))
    assert (scene.answer, asked.answer) == ("6", "yes")
    assert write(asked, "misreading")[1:] == ("red circle: 1\nblue square: 3\n1<3", "no")
    absent = replace(scene, question=Question("count", (Kind("yellow", "square"),)))
    assert write(absent, "misreading").answer == "0"


def test_misreading_is_the_majority_of_what_is_taught() -> None:
    """Claim: with a quarter of faithful scenes the shares of faults are the design's, within four standard errors.

    Oracle: 6,000 scenes of an independent prototype: caption wrong .71, reasoning .60, answer .46.
    """
    asked = [make_scene("sft", seed=0, index=index, world="drift") for index in range(1_500)]
    texts = [response_text(*write(s, SLOPPY_TEACHER["drift"], faithful_share=FAITHFUL_SHARE, seed=1)) for s in asked]
    found = [judge(scene, text) for scene, text in zip(asked, texts, strict=True)]
    assert all(one.format_valid and one.num_items == one.items_in_scene for one in found)
    shares = {"caption_exact": 0.71, "reasoning_exact": 0.60, "answer_right": 0.46}
    for name, share in shares.items():
        wrong = mean([not getattr(one, name) for one in found])
        assert wrong == pytest.approx(share, abs=4 * (share * (1 - share) / len(found)) ** 0.5), name
    # One coin a scene: no caption is right beside reasoning that was misread, but where both read alike.
    for scene, one in zip(asked, found, strict=True):
        assert one.reasoning_exact or not one.caption_exact, scene.id
