"""Samples held-out scenes with the rollout engine, judges them against the known truth and counts their form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.tokenizer import END_TOKEN
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.proxies import ResponseForm, response_form
from prism_megatron.evaluation.scenes import SceneJudgement, judge
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.sampling.shares import sample_groups


@dataclass(frozen=True)
class SceneResponse:
    """One response to a scene: how right it is, and its form, which is None where the format is not valid."""

    judgement: SceneJudgement
    form: ResponseForm | None


def heldout_scenes(renderer: Renderer, *, count: int, seed: int) -> Sequence[Example]:
    """The first ``count`` scenes of the held-out split, whose questions and contents no training split has."""
    return SceneSource(renderer, split="heldout", seed=seed, batch_size=count).batch(0)


def answer_scenes(
    rollout: RolloutEngine,
    examples: Sequence[Example],
    renderer: Renderer,
    sampling: Sampling,
    *,
    seed: int,
    world: World,
) -> list[SceneResponse]:
    """One response per scene; the same list on every rank. Draws are keyed by ``seed``, not by the policy."""
    groups = sample_groups(rollout, examples, sampling, n=1, seed=seed, step=0, world=world)
    responses = []
    for example, group in zip(examples, groups, strict=True):
        if example.scene is not None:
            token_ids = group.rollouts[0].token_ids
            text = renderer.decode(token_ids)
            responses.append(SceneResponse(judge(example.scene, text), _form(text, len(token_ids))))
    return responses


def reference_forms(examples: Sequence[Example], renderer: Renderer) -> list[ResponseForm]:
    """The form of the examples' references: the supervision that drift is measured from."""
    forms = [
        _form(renderer.decode(example.reference.token_ids), len(example.reference.token_ids)) for example in examples
    ]
    return [form for form in forms if form is not None]


def _form(text: str, tokens: int) -> ResponseForm | None:
    return response_form(text.removesuffix(END_TOKEN), tokens=tokens)
