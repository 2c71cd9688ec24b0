"""How a policy answers held-out scenes: every figure of every answer, kept in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.data.tokenizer import END_TOKEN
from prism_megatron.disk import write_atomically
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.scenes import judge
from prism_megatron.experiments.mini_figures import TOKENS_PER_MICROBATCH, replica_of
from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling.scene_answers import MEASURES, MODES
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.training.policy_update import UpdatePlan
from prism_megatron.training.roles import batch_format, build_policy
from prism_megatron.training.visual_reliance import CAPTION, REASONING, Asked, Likelihood, likelihoods
from prism_megatron.types import Response, Rollout

Array = npt.NDArray[np.float64]
Answers = Mapping[str, Mapping[str, Array]]
"""Per mode and measure ``[scenes, samples]``."""

FORMAT, TOKENS, NATS = "format valid", "tokens", "nats a token"
"""Measures of an answer's form; the last is the mean of -log p of its tokens, an estimate of the entropy where it was
sampled at temperature 1."""
ALL_MEASURES = (*MEASURES, FORMAT, TOKENS, NATS)
CAPTION_RELIANCE, REASONING_RELIANCE = "caption reliance", "reasoning reliance"
"""Of greedy answers alone, and of the first scenes: what they owe to the image."""
RELIANCE_SCENES = 256
RESPONSES = "responses.jsonl"
ANSWERS = "answers.json"
_DECIMALS = 4


def ask(
    policy: Path, examples: Sequence[Example], renderer: Renderer, target: Path, *, samples: int,
    max_new_tokens: int, seed: int, world: World,
) -> None:  # fmt: skip
    """Have the policy answer all scenes and write ``answers.json``, and one answer to each as ``responses.jsonl``.

    Of the first greedy answers it is found what they owe to the image.
    """
    rollout = replica_of(policy, renderer, world)
    said: list[Rollout] = []
    document: dict[str, dict[str, list[list[float]]]] = {}
    texts: list[str] = []
    for mode, temperature in MODES.items():
        sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
        count = samples if temperature else 1
        groups = sample_groups(rollout, examples, sampling, n=count, seed=seed, step=0, world=world)
        answers = [
            [_figures(example, one, renderer) for one in group.rollouts]
            for example, group in zip(examples, groups, strict=True)
        ]
        document[mode] = {
            measure: [[round(figures[measure], _DECIMALS) for figures in of_scene] for of_scene in answers]
            for measure in ALL_MEASURES
        }
        if not temperature:
            said = [group.rollouts[0] for group in groups]
        else:
            texts = [renderer.decode(group.rollouts[0].token_ids).removesuffix(END_TOKEN) for group in groups]
    rollout.close()
    looked = list(zip(examples, said, strict=True))[:RELIANCE_SCENES]
    document["greedy"] |= reliance_of(policy, looked, renderer, world)
    write_responses(target / RESPONSES, [example.prompt.id for example in examples], texts)
    write_atomically(target / ANSWERS, json.dumps(document) + "\n")


def write_responses(path: Path, ids: Sequence[str], texts: Sequence[str]) -> None:
    """Lines of id and response, as ``prism-drift`` reads them."""
    lines = [json.dumps({"id": id_, "response": text}) for id_, text in zip(ids, texts, strict=True)]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def reliance_of(
    folder: Path, looked: Sequence[tuple[Example, Rollout]], renderer: Renderer, world: World
) -> dict[str, list[list[float]]]:
    """Nats a token by which the image makes a policy's own caption, and its reasoning, likelier; one a scene.

    0 where an answer is not in the asked form, and so has neither.
    """
    policy = build_policy(
        folder, Qwen3VLShape.from_folder(folder), world=world, dtype=torch.float32, optimizer=None, total_steps=1
    )
    plan = UpdatePlan(PolicyObjective(), batch_format(renderer, world), TOKENS_PER_MICROBATCH)
    asked = [Asked(example.prompt, Response(said.token_ids, said.segments)) for example, said in looked]
    found = likelihoods(policy, asked, plan, world=world)

    def a_token(one: Likelihood | None) -> float:
        return 0.0 if one is None else round((one.seen - one.blank) / one.tokens, _DECIMALS)

    return {
        measure: [[a_token(of_answer.get(segment))] for of_answer in found]
        for measure, segment in ((CAPTION_RELIANCE, CAPTION), (REASONING_RELIANCE, REASONING))
    }


def _figures(example: Example, answer: Rollout, renderer: Renderer) -> dict[str, float]:
    assert example.scene is not None, "scenes are asked"
    judgement = judge(example.scene, renderer.decode(answer.token_ids))
    return {
        **{name: read(judgement) for name, read in MEASURES.items()},
        FORMAT: float(judgement.format_valid),
        TOKENS: float(len(answer.token_ids)),
        NATS: -sum(answer.logprobs) / len(answer.logprobs),
    }


def read_answers(folder: Path) -> Answers:
    """What :func:`ask` wrote."""
    document = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
    return {
        mode: {measure: np.array(values, dtype=np.float64) for measure, values in measures.items()}
        for mode, measures in document.items()
    }
