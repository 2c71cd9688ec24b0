"""What words owe to the image: the mini beside transformers, over layouts, and as the command writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.tools.visual_reliance import VisualRelianceConfig
from prism_megatron.data.model_inputs import transformers_inputs
from prism_megatron.parity.oracle import load_transformers
from prism_megatron.testing import GlooWorld, RankError
from prism_megatron.training.visual_reliance import Asked, Likelihood, Reliance
from prism_megatron.types import TokenSequence
from tests.mini_players import FOLDER
from tests.reliance_ranks import asked_of_scenes, measured, readings, reliance

QUESTIONS = 7
SCENES = VisualRelianceConfig(model=str(FOLDER), scenes=6, system_prompt=None)


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(8) as world:
        yield world


@pytest.fixture(scope="module")
def alone(gloo: GlooWorld) -> dict[str, Reliance]:
    found: dict[str, Reliance] = gloo.run(reliance, QUESTIONS, num_ranks=1)[0]
    return found


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(3, ParallelConfig()), (2, ParallelConfig(tp=2)), (8, ParallelConfig(tp=2, pp=2, cp=2))],
    ids=["DP3", "TP2", "TP2-PP2-CP2"],
)
def test_layouts_agree(gloo: GlooWorld, alone: dict[str, Reliance], ranks: int, parallel: ParallelConfig) -> None:
    """Within 1e-4 nats a token; seven questions in fours, which data-parallel ranks share unevenly."""
    for found in gloo.run(reliance, QUESTIONS, num_ranks=ranks, parallel=parallel):
        assert found.keys() == alone.keys() == {"caption", "reasoning", "whole"}
        for segment, own in found.items():
            expected = alone[segment]
            assert (own.responses, own.tokens) == (expected.responses, expected.tokens)
            assert (own.seen, own.blank) == pytest.approx((expected.seen, expected.blank), abs=1e-4)
            assert own.difference == pytest.approx(expected.difference, abs=1e-4)


def _transformers(asked: Sequence[Asked]) -> list[dict[str, Likelihood]]:
    """Each row alone, in float64 from its logits on; the blank image is made here."""
    shape, cpu = Qwen3VLShape.from_folder(FOLDER), torch.device("cpu")
    model = load_transformers(FOLDER, shape, dtype=torch.float32, device=cpu)
    found = []
    for prompt, response in asked:
        blank = [replace(one, pixel_values_P_D=np.zeros_like(one.pixel_values_P_D)) for one in prompt.images]
        of_images = []
        for images in (prompt.images, tuple(blank)):
            row = TokenSequence((*prompt.token_ids, *response.token_ids), images)
            with torch.no_grad():
                logits = model(**transformers_inputs(row, shape, cpu)).logits[0].double()
            first = len(prompt.token_ids)
            table = torch.log_softmax(logits[first - 1 : -1], dim=-1)
            of_images.append(table.gather(-1, torch.tensor(response.token_ids).unsqueeze(-1)).squeeze(-1).tolist())
        caption, reasoning = response.segments.perception, response.segments.reasoning
        assert caption is not None and reasoning is not None
        spans = {"caption": caption, "reasoning": reasoning, "whole": (0, len(response.token_ids))}
        found.append({name: Likelihood(b - a, *(sum(one[a:b]) for one in of_images)) for name, (a, b) in spans.items()})
    return found


def test_it_is_what_transformers_finds(gloo: GlooWorld) -> None:
    """Claim: log-probs of each response's segments, in all, with image and blank one, within 1e-3 nats.

    Five scenes over micro-batches of a few. The mini's captions owe the image more a token than its reasoning does.
    """
    (found,) = gloo.run(readings, 5, num_ranks=1)
    for own, expected in zip(found, _transformers(asked_of_scenes(5)), strict=True):
        assert own.keys() == expected.keys()
        for segment, one in own.items():
            assert one.tokens == expected[segment].tokens
            assert one[1:] == pytest.approx(expected[segment][1:], abs=1e-3)
    caption, reasoning = (
        sum(one[segment].seen - one[segment].blank for one in found) / sum(one[segment].tokens for one in found)
        for segment in ("caption", "reasoning")
    )
    assert caption > 0.5 and caption > reasoning > 0


def test_chunks_change_nothing(gloo: GlooWorld, alone: dict[str, Reliance]) -> None:
    """Claim: however many images are held at a time, every question counts once; the interval holds its mean."""
    (all_at_once,) = gloo.run(reliance, QUESTIONS, QUESTIONS, num_ranks=1)
    for segment, own in alone.items():
        assert own.responses == QUESTIONS
        assert own.difference == pytest.approx(all_at_once[segment].difference, abs=1e-5)
        assert own.difference.mean == pytest.approx(own.seen - own.blank, abs=1e-9)
        assert own.difference.low <= own.difference.mean <= own.difference.high


def test_the_command_writes_what_it_found(gloo: GlooWorld, tmp_path: Path) -> None:
    output = tmp_path / "out" / "reliance.json"
    (found,) = gloo.run(measured, replace(SCENES, output=output), num_ranks=1)
    written = json.loads(output.read_text())
    assert list(written["segments"]) == ["caption", "reasoning", "whole"]
    caption = written["segments"]["caption"]
    assert caption["responses"] == 6 and caption["difference"]["mean"] > 0.5
    assert caption["difference"]["mean"] == found["caption"].difference.mean
    assert written["left_out"] == {"no response, or no caption in the reference": 0}


def test_nothing_left_is_said(gloo: GlooWorld) -> None:
    with pytest.raises(RankError, match="no question is left: 6 question too long"):
        gloo.run(measured, replace(SCENES, max_prompt_tokens=3), num_ranks=1)
