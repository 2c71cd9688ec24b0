"""Scenes that are asked again and again: which ones, in which order, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet, selected_scenes
from prism_megatron.data.scenes import make_scene
from prism_megatron.data.selection import Selection, digest_of, read_selection
from prism_megatron.errors import DataError

SCENES = [make_scene("align", seed=4, index=index, world="drift") for index in range(6)]


def selection(folder: Path, *lines: Mapping[str, object]) -> Selection:
    path = folder / "selected.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return read_selection(path)


def test_every_epoch_asks_all_of_them_in_another_order() -> None:
    """Claim: batches run on over the ends of epochs; each epoch has every scene once, with its faithful reference."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    chosen = SceneSet(SCENES, renderer, seed=1, batch_size=4)
    asked = [example.prompt.id for step in range(3) for example in chosen.batch(step)]
    assert sorted(asked[:6]) == sorted(asked[6:]) == sorted(scene.id for scene in SCENES)
    assert asked[:6] != asked[6:]
    assert asked == [example.prompt.id for step in range(3) for example in chosen.batch(step)]
    assert chosen.in_order(2).scene == SCENES[2]
    assert "<answer>" + SCENES[2].answer in renderer.decode(chosen.in_order(2).reference.token_ids)
    others = SceneSet(SCENES[:5], renderer, seed=1, batch_size=4)
    assert chosen.identity != others.identity


def test_a_selection_is_found_again(tmp_path: Path) -> None:
    """Claim: in the order of the file, whatever the seed of a run, with digests that are held against the scenes."""
    lines = [{"id": scene.id, "digest": digest_of(scene)} for scene in (SCENES[3], SCENES[0])]
    assert selected_scenes(selection(tmp_path, *lines), split="align", mini="drift") == [SCENES[3], SCENES[0]]
    changed = replace(SCENES[0], counts=tuple((kind, 4 - count) for kind, count in SCENES[0].counts))
    assert changed.question == SCENES[0].question and changed.answer != SCENES[0].answer
    assert digest_of(changed) != digest_of(SCENES[0])


@pytest.mark.parametrize(
    ("name", "digest", "complaint"),
    [
        (make_scene("heldout", seed=4, index=0, world="drift").id, None, "is no scene of the split 'align' of --mini"),
        (make_scene("align", seed=4, index=0).id, None, "is no scene of the split 'align' of --mini drift"),
        ("tabmwp-17", None, "name the set of records that it is of by --data"),
        (SCENES[0].id, "0123456789abcdef", "had another question or answer"),
    ],
)
def test_what_is_no_scene_of_the_run_is_refused(name: str, digest: str | None, complaint: str, tmp_path: Path) -> None:
    """Claim: held-out scenes, another world's, records and changed scenes are errors that name the line."""
    lines = selection(
        tmp_path, {"id": SCENES[1].id}, {"id": name} if digest is None else {"id": name, "digest": digest}
    )
    with pytest.raises(DataError, match=f"selected.jsonl:2: .*{complaint}"):
        selected_scenes(lines, split="align", mini="drift")
