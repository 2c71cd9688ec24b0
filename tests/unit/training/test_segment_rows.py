"""What the discriminator reads of an answer does not give away who wrote it (docs/method.md, section 3)."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.render import Renderer
from prism_megatron.game.judged_rows import segment_row
from prism_megatron.training.batches import BatchFormat
from prism_megatron.types import PERCEPTION, REASONING, PreferenceGroup, Prompt, Response, Rollout, VersionSpan

WRITING = ("- red circle: 2\n- blue square: 1", "red circle: 2\nblue square: 1\n2+1=3", "3")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.from_folder(MINI_FOLDER / "policy")


def sampled(renderer: Renderer, token_ids: tuple[int, ...]) -> Rollout:
    """A rollout with these tokens, as an engine hands it over."""
    span = VersionSpan(0, 0, len(token_ids))
    segments = renderer.segment_finder.find(token_ids)
    return Rollout(token_ids, (-1.0,) * len(token_ids), "stop", (span,), segments)


def form_of(renderer: Renderer) -> BatchFormat:
    return BatchFormat(renderer.pad_token_id, renderer.end_token_id, length_multiple=1, device=torch.device("cpu"))


def test_equal_text_gives_equal_ids(renderer: Renderer) -> None:
    """Claim: reference and rollout of one text are one row, token by token, in both towers.

    Also where the reference is a caption alone. Blind spot: a policy may spell the same text in other tokens.
    """
    prompt = Prompt(id="p", token_ids=(5, 6), images=(), question="")
    reference = renderer.response(*WRITING)
    rollout = sampled(renderer, reference.token_ids)
    caption = renderer.caption_alone(WRITING[0])
    for own, towers in ((reference, (PERCEPTION, REASONING)), (caption, (PERCEPTION,))):
        group = PreferenceGroup(prompt, own, (rollout,))
        assert group.towers == towers
        assert group.valid_rollouts == (0,)
        for tower in towers:
            theirs, ours = (segment_row(group, one, tower, form_of(renderer)) for one in (own, rollout))
            assert theirs.token_ids == ours.token_ids


def test_every_row_ends_in_the_same_token(renderer: Renderer) -> None:
    """Captions and reasoning of other texts and of other lengths: one last token for all, and it is not padding."""
    other = renderer.response("- green star: 4", "green star: 4", "4")
    answers: list[Response | Rollout] = [renderer.response(*WRITING), sampled(renderer, other.token_ids)]
    group = PreferenceGroup(Prompt(id="p", token_ids=(5, 6), images=(), question=""), other, tuple(answers))
    rows = [segment_row(group, one, tower, form_of(renderer)) for one in answers for tower in group.towers]
    assert {row.token_ids[-1] for row in rows} == {renderer.end_token_id}
    assert renderer.end_token_id != renderer.pad_token_id
