"""How a policy answers held-out scenes: every figure of every answer, kept in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.data.tokenizer import END_TOKEN
from prism_megatron.disk import write_atomically
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.scenes import judge
from prism_megatron.experiments.mini_figures import replica_of
from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling.scene_answers import MEASURES, MODES
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.types import Rollout

Array = npt.NDArray[np.float64]
Answers = Mapping[str, Mapping[str, Array]]
"""Per mode and measure ``[scenes, samples]``."""

FORMAT, TOKENS, NATS = "format valid", "tokens", "nats a token"
"""Measures of an answer's form; the last is the mean of -log p of its tokens, an estimate of the entropy where it was
sampled at temperature 1."""
ALL_MEASURES = (*MEASURES, FORMAT, TOKENS, NATS)
RESPONSES = "responses.jsonl"
_ANSWERS = "answers.json"
_DECIMALS = 4


def ask(
    policy: Path, examples: Sequence[Example], renderer: Renderer, target: Path, *, samples: int,
    max_new_tokens: int, seed: int, world: World,
) -> None:  # fmt: skip
    """Have the policy answer all scenes and write ``answers.json``, and one answer to each as ``responses.jsonl``."""
    rollout = replica_of(policy, renderer, world)
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
        if temperature:
            texts = [renderer.decode(group.rollouts[0].token_ids).removesuffix(END_TOKEN) for group in groups]
    rollout.close()
    lines = [
        json.dumps({"id": example.prompt.id, "response": text}) for example, text in zip(examples, texts, strict=True)
    ]
    write_atomically(target / RESPONSES, "".join(f"{line}\n" for line in lines))
    write_atomically(target / _ANSWERS, json.dumps(document) + "\n")


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
    document = json.loads((folder / _ANSWERS).read_text(encoding="utf-8"))
    return {
        mode: {measure: np.array(values, dtype=np.float64) for measure, values in measures.items()}
        for mode, measures in document.items()
    }
