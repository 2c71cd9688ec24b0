"""Drawing answers and handing weights over: what a GPU of those who sample does in a step."""

from __future__ import annotations

from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.forecast.plays import Case
from prism_megatron.observability.model_flops import Arithmetic
from prism_megatron.planning.build import Batch
from prism_megatron.planning.floors import Phase
from prism_megatron.planning.links import Traffic
from prism_megatron.planning.serving import Serving, serving_of


def decoding(rollout: RolloutConfig, case: Case, batch: Batch) -> list[Phase]:
    """Prompts are read once each; tokens come one after another, with the weights read for each of them."""
    longest = batch.prompt_tokens + batch.answer_tokens
    serving = serving_of(rollout, case, resting=0, longest=longest)
    gpus = serving.engines * serving.gpus
    arithmetic = Arithmetic.of(case.shape)
    at_once = batch.sequences / serving.engines
    read = batch.prompts * (arithmetic.token * batch.prompt_tokens + arithmetic.pair * batch.prompt_tokens**2 / 2)
    pairs = batch.answer_tokens * batch.prompt_tokens + batch.answer_tokens**2 / 2
    drawn = batch.sequences * ((arithmetic.token + arithmetic.label) * batch.answer_tokens + arithmetic.pair * pairs)
    cache = serving.a_token * at_once * pairs
    weights = serving.weights * batch.answer_tokens * touched(case, at_once)
    return [
        Phase("read the prompts", 2 * read / gpus, serving.weights),
        Phase("draw the answers", 2 * drawn / gpus, weights + cache),
        _handover(rollout, serving),
    ]


def touched(case: Case, at_once: float) -> float:
    """The share of the weights that a token of each of ``at_once`` answers needs: experts are chosen evenly."""
    experts = case.shape.text.experts
    if experts is None:
        return 1.0
    text = case.shape.text
    of_experts: float = text.num_layers * 3 * text.hidden * experts.width * experts.count
    others = Arithmetic.of(case.shape).token - text.num_layers * 3 * text.hidden * experts.width * experts.per_token
    chosen: float = 1 - (1 - experts.per_token / experts.count) ** max(1.0, at_once)
    return (others + chosen * of_experts) / (others + of_experts)


def _handover(rollout: RolloutConfig, serving: Serving) -> Phase:
    """Each GPU that samples takes its weights in once; over which way depends on --rollout-sync."""
    near = rollout.rollout == "embedded" or rollout.rollout_colocated
    size = float(serving.weights)
    traffic = Traffic("hand-over", 1, size if near else 0.0, 0.0 if near else size)
    return Phase("hand the weights over", 0.0, 2 * size, (traffic,))
