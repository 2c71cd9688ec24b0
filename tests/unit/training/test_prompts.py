"""A look at images that ranks share: each sees its part, all get the whole in order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from prism_megatron.data.pictures.files import look_at
from prism_megatron.data.reading.intake import Counts
from prism_megatron.observability.activity import Activity
from prism_megatron.training import prompts
from prism_megatron.training.prompts import look_together, say_counts


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_the_look(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: every file is opened by one rank, the answer is the same on each and in the files' order."""
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for number, path in enumerate(paths[:-1]):
        Image.new("RGB", (number + 1, 2)).save(path)
    gathered = [look_at(paths[rank::size], pixels=True) for rank in range(size)]
    for rank in range(size):

        def gather(own: Any, rank: int = rank) -> Any:
            assert own == gathered[rank]
            return gathered

        activity = Activity()
        monkeypatch.setattr(prompts, "all_gather_objects", gather)
        world: Any = SimpleNamespace(rank=rank, world_size=size)
        assert look_together(world, activity)(paths, True) == look_at(paths, pixels=True)


def test_a_look_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, activity, told = tmp_path / "a.png", Activity(), list[str]()
    Image.new("RGB", (2, 2)).save(path)

    def look(paths: Any, *, pixels: bool, advance: Any) -> Any:
        advance(1)
        told.append(activity.text())
        return look_at(paths, pixels=pixels)

    monkeypatch.setattr(prompts, "look_at", look)
    monkeypatch.setattr(prompts, "all_gather_objects", lambda own: [own])
    world: Any = SimpleNamespace(rank=0, world_size=1)
    look_together(world, activity)([path] * 3, False)
    assert told[0].startswith("checking images, 1 of 3 images")


def test_counts_and_the_first_bad_lines_are_said() -> None:
    said: list[str] = []
    say_counts(None, None, said.append)
    assert said == []
    reasons = {"bad_json": "not a JSON object", "no_caption": "without a caption"}
    held_out = Counts(9, 8, {"bad_json": 1}, {}, reasons, ("x:3: bad",))
    say_counts(
        Counts(9, 5, {"bad_json": 1, "no_caption": 3}, {"pairs": 4}, reasons, ("x:3: bad",)), held_out, said.append
    )
    assert said == [
        "data: 5 of 9 lines are used (4 pairs); left out: 1 not a JSON object, 3 without a caption",
        "left out: x:3: bad",
        "held-out data: 8 of 9 lines are used; left out: 1 not a JSON object",
    ]
