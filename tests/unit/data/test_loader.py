"""Sources: a batch depends on its step alone, epochs cover every record once, and what is left out is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_megatron.data.identity import identity_of
from prism_megatron.data.loader import Example, RecordSource, SceneSource
from prism_megatron.data.reading.intake import NothingLeftError
from prism_megatron.data.records import Part, Record
from prism_megatron.data.render import Renderer
from prism_megatron.data.teachers import write
from prism_megatron.errors import DataError

NUM_RECORDS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty usable records, the first without a solution; one has no caption, one a long question, two long ones."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "images").mkdir()
    lines = []
    for i in range(NUM_RECORDS + 4):
        Image.new("RGB", (32 + i, 32), (i, i, i)).save(folder / "images" / f"{i}.png")
        record = {"id": f"r-{i}", "image": f"images/{i}.png", "question": f"Number {i}?", "choices": None}
        record |= {"answer": str(i), "answer_type": "integer", "solution": f"s {i}", "caption": "c", "source": "set"}
        lines.append(record)
    lines[0]["solution"] = lines[-4]["caption"] = None
    lines[-3]["question"] = "many " * 100
    lines[-2]["caption"] = lines[-1]["caption"] = "many " * 100
    (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return folder


def record_source(
    folder: Path,
    renderer: Renderer,
    *,
    seed: int = 0,
    part: Part = "train",
    prompt_tokens: int = 60,
    response_tokens: int = 60,
    answers_alone: bool = False,
    checkable: Callable[[Record], bool] | None = None,
) -> RecordSource:
    return RecordSource(
        folder,
        renderer,
        part=part,
        seed=seed,
        batch_size=4,
        max_prompt_tokens=prompt_tokens,
        max_response_tokens=response_tokens,
        validation_share=0.0,
        answers_alone=answers_alone,
        checkable=checkable,
    )


def ids(batch: list[Example]) -> list[str]:
    return [example.prompt.id for example in batch]


def test_scene_batches_depend_on_the_step_alone(renderer: Renderer) -> None:
    source = SceneSource(renderer, split="sft", seed=1, batch_size=3, teacher="sloppy", faithful_share=0.25)
    later = SceneSource(renderer, split="sft", seed=1, batch_size=3, teacher="sloppy", faithful_share=0.25).batch(5)
    for step in range(5):
        source.batch(step)
    for one, other in zip(source.batch(5), later, strict=True):
        assert (one.prompt.token_ids, one.reference, one.scene) == (
            other.prompt.token_ids,
            other.reference,
            other.scene,
        )
        assert np.array_equal(one.prompt.images[0].pixel_values_P_D, other.prompt.images[0].pixel_values_P_D)
    assert ids(source.batch(0)) == ["scene-sft-1-0", "scene-sft-1-1", "scene-sft-1-2"]
    assert not set(ids(source.batch(1))) & set(ids(source.batch(2)))


def test_a_source_of_scenes_writes_as_its_own_teacher(renderer: Renderer) -> None:
    """Claim: the share of faithful writing and the seed are those given, which differ from the defaults."""
    source = SceneSource(renderer, split="sft", seed=7, batch_size=40, teacher="sloppy", faithful_share=0.5)
    for example in source.batch(1):
        assert example.scene is not None and example.scene.seed == 7
        wanted = write(example.scene, "sloppy", faithful_share=0.5, seed=7)
        assert example.reference == renderer.response(*wanted)


def test_a_source_of_scenes_is_of_one_world(renderer: Renderer) -> None:
    """Claim: the world's scenes are asked, and a run cannot go on with another world's; the first one's name is old."""
    sources = [SceneSource(renderer, split="align", seed=1, batch_size=3, world=mini) for mini in ("habits", "drift")]
    assert ids(sources[1].batch(2))[0] == "scene-drift-align-1-6"
    assert sources[0].identity != sources[1].identity
    assert sources[0].identity == identity_of("data", [("scenes of align by faithful", ())], batch_size=3)


def test_record_epochs_are_permutations_keyed_by_the_seed(folder: Path, renderer: Renderer) -> None:
    source = record_source(folder, renderer)
    epochs = [[name for step in range(e * 5, e * 5 + 5) for name in ids(source.batch(step))] for e in range(2)]
    assert len(set(epochs[0])) == NUM_RECORDS and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    assert ids(record_source(folder, renderer).batch(7)) == ids(source.batch(7))
    assert ids(record_source(folder, renderer, seed=1).batch(7)) != ids(source.batch(7))


def test_left_out_records_are_counted(folder: Path, renderer: Renderer) -> None:
    source = record_source(folder, renderer)
    assert source.counts.to_plain() == {
        "lines": NUM_RECORDS + 4, "kept": NUM_RECORDS, "no_caption": 1, "long_prompt": 1, "long_response": 2,
        "without_reasoning": 1,
    }  # fmt: skip
    examples = [example for step in range(NUM_RECORDS // 4) for example in source.batch(step)]
    alone = [one.prompt.id for one in examples if one.reference.segments.reasoning is None]
    assert alone == ["r-0"], "a record without a solution is compared by its caption alone"
    example = next(one for one in examples if one.prompt.id == "r-7")
    assert example.record is not None and example.scene is None
    assert example.prompt.question == example.record.question_text
    assert example.reference == renderer.response("c", "s 7", "7")


def test_records_that_are_asked_for_their_answer_need_no_caption(folder: Path, renderer: Renderer) -> None:
    """Claim: nor does a long one count; the reference is the answer with the end token, and no segment is judged."""
    source = record_source(folder, renderer, answers_alone=True)
    assert source.counts.to_plain() == {
        "lines": NUM_RECORDS + 4, "kept": NUM_RECORDS + 3, "long_prompt": 1, "without_reasoning": 0
    }  # fmt: skip
    examples = [source.example(position) for position in range(NUM_RECORDS + 3)]
    example = next(one for one in examples if one.prompt.id == f"r-{NUM_RECORDS}")
    assert example.record is not None and example.record.answer_type == "integer"
    assert renderer.decode(example.reference.token_ids[:-1]) == str(NUM_RECORDS)
    assert example.reference.token_ids[-1] == renderer.end_token_id and not example.reference.segments.valid


def test_records_whose_answer_cannot_be_checked_are_counted(folder: Path, renderer: Renderer) -> None:
    source = record_source(folder, renderer, answers_alone=True, checkable=lambda record: record.answer != "3")
    assert "r-3" not in [record.id for record in source.records] and source.counts.left_out["not_checkable"] == 1
    assert "1 with an answer that no rule can check" in source.counts.text()
    with pytest.raises(NothingLeftError, match="24 of 24 are with an answer that no rule can check"):
        record_source(folder, renderer, answers_alone=True, checkable=lambda _: False)


def test_what_is_as_long_as_the_bound_is_used(folder: Path, renderer: Renderer) -> None:
    """One token less and the longest prompt, or reference, of those that fit is left out."""
    source = record_source(folder, renderer)
    examples = [source.example(position) for position in range(NUM_RECORDS)]
    prompt = max(len(example.prompt.token_ids) for example in examples)
    response = max(len(example.reference.token_ids) for example in examples)
    exact = record_source(folder, renderer, prompt_tokens=prompt, response_tokens=response)
    assert exact.counts.kept == NUM_RECORDS
    assert record_source(folder, renderer, prompt_tokens=prompt - 1).counts.left_out["long_prompt"] > 1
    assert record_source(folder, renderer, response_tokens=response - 1).counts.left_out["long_response"] > 2


def test_no_record_of_a_benchmark_is_trained_on(folder: Path, renderer: Renderer, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mathvision_testmini")
    with pytest.raises(DataError, match="evaluation only"):
        record_source(tmp_path / "mathvision_testmini", renderer)


def test_a_part_without_records_is_refused(folder: Path, renderer: Renderer) -> None:
    with pytest.raises(DataError, match=r"no line is left to use: 24 of 24 are of the training part$"):
        record_source(folder, renderer, part="validation")
