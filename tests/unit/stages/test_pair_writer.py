"""The pairs that a run writes are those it had, whether it was killed or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from prism_megatron.data.loader import Example
from prism_megatron.data.pairs import read_pairs
from prism_megatron.data.records import Record
from prism_megatron.data.render import Renderer
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.stages.warm_start.pair_writer import PairWriter
from prism_megatron.types import PreferenceGroup, Response
from tests.unit.game.mini_judge import POLICY, answer, scenes

Step = tuple[Sequence[Example], Sequence[PreferenceGroup]]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.from_folder(POLICY)


def broken(whole: Response, renderer: Renderer) -> Response:
    """The answer with a byte in its caption that is no UTF-8, which is valid and has no text."""
    byte = renderer.tokenizer.convert_tokens_to_ids("\u00ff")
    tokens = (*whole.token_ids[:6], byte, *whole.token_ids[6:])
    assert renderer.segment_finder.find(tokens).valid
    return Response(tokens, renderer.segment_finder.find(tokens))


def step_of(renderer: Renderer, step: int) -> Step:
    """Three prompts: of the first, answers 1 and 3 can be written, of the second none, of the third its only one."""
    examples = scenes(renderer, 3).batch(step)

    def given(prompt: int, number: int, *, valid: bool = True) -> Response:
        return answer(examples[prompt], renderer, number, valid=valid)

    answers = (
        (given(0, 0, valid=False), given(0, 1), broken(given(0, 2), renderer), given(0, 3)),
        (given(1, 0, valid=False), broken(given(1, 1), renderer)),
        (given(2, 0),),
    )
    return examples, [
        PreferenceGroup(example.prompt, example.reference, own) for example, own in zip(examples, answers, strict=True)
    ]


def write_all(path: Path, renderer: Renderer, steps: Sequence[Step]) -> bytes:
    writer = PairWriter(path, renderer, fresh=True)
    for step, (examples, groups) in enumerate(steps):
        writer.write(step, examples, groups)
    writer.close(len(steps))
    return path.read_bytes()


def test_what_is_written_is_read_as_the_same_tokens(tmp_path: Path, renderer: Renderer) -> None:
    """Prompt, picture, reference and every valid answer that has a text come back; the count is that of pairs."""
    examples, groups = step_of(renderer, 0)
    path = tmp_path / "pairs.jsonl"
    writer = PairWriter(path, renderer, fresh=True)
    assert writer.write(0, examples, groups) == 3
    writer.close(1)
    lines = read_pairs(path)
    assert [line.id for line in lines] == [groups[0].prompt.id, groups[2].prompt.id]
    for line, example, group, wanted in zip(lines, examples[::2], groups[::2], ((1, 3), (0,)), strict=True):
        assert renderer.written(line.chosen, id="x") == group.reference
        rejected = [renderer.written(text, id="x") for text in line.rejected]
        assert rejected == [group.rollouts[number] for number in wanted]
        assert (line.question, line.source) == (example.prompt.question, "scenes")
        assert example.scene is not None
        with Image.open(line.image) as picture:
            assert picture.tobytes() == example.scene.image().tobytes()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "images", path], "parts are left"


def test_a_record_keeps_its_picture_file_and_source(tmp_path: Path, renderer: Renderer) -> None:
    """One picture that two records show is one file."""
    (scene,) = scenes(renderer, 1).batch(0)
    pictures = [tmp_path / name for name in ("one.jpg", "again.jpg", "other.jpg")]
    for picture, colour in zip(pictures, ("red", "red", "blue"), strict=True):
        Image.new("RGB", (40, 30), colour).save(picture)
    records = [Record(p.stem, p, "q", None, "Yes", "s", "c", "set/one") for p in pictures]
    examples = [Example(scene.prompt, scene.reference, record=record) for record in records]
    groups = [PreferenceGroup(scene.prompt, scene.reference, (answer(scene, renderer, 1),))] * 3
    path = tmp_path / "out" / "pairs.jsonl"
    write_all(path, renderer, [(examples, groups)])
    lines = read_pairs(path)
    assert [line.image.read_bytes() for line in lines] == [picture.read_bytes() for picture in pictures]
    assert lines[0].image == lines[1].image != lines[2].image
    assert {(line.image.suffix, line.source) for line in lines} == {(".jpg", "set/one")}


def test_a_killed_run_ends_in_the_file_of_an_uninterrupted_one(tmp_path: Path, renderer: Renderer) -> None:
    """It goes on with the parts that it had, step 1 once more; one that begins anew has none of them."""
    steps = [step_of(renderer, step) for step in range(3)]
    expected = write_all(tmp_path / "whole.jsonl", renderer, steps)
    path = tmp_path / "pairs.jsonl"
    killed = PairWriter(path, renderer, fresh=True)
    killed.write(0, *steps[0])
    killed.write(1, *steps[2])
    resumed = PairWriter(path, renderer, fresh=False)
    resumed.write(1, *steps[1])
    with pytest.raises(DataError, match="--write-pairs was not given in step 3"):
        resumed.close(3)
    resumed.write(2, *steps[2])
    resumed.close(3)
    assert path.read_bytes() == expected
    with pytest.raises(ConfigError, match=r"pairs\.jsonl exists"):
        PairWriter(path, renderer, fresh=True)


def test_a_fresh_run_holds_nothing_of_an_earlier_one(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "pairs.jsonl"
    PairWriter(path, renderer, fresh=True).write(0, *step_of(renderer, 0))
    with pytest.raises(DataError, match="not given in step 1 "):
        PairWriter(path, renderer, fresh=True).close(1)


def test_parts_of_steps_that_are_no_longer_asked_for_stay_out(tmp_path: Path, renderer: Renderer) -> None:
    """A run that goes on with fewer ``--steps`` writes the pairs of these."""
    steps = [step_of(renderer, step) for step in range(2)]
    path = tmp_path / "pairs.jsonl"
    writer = PairWriter(path, renderer, fresh=True)
    for step, (examples, groups) in enumerate(steps):
        writer.write(step, examples, groups)
    writer.close(1)
    assert path.read_bytes() == write_all(tmp_path / "first.jsonl", renderer, steps[:1])
