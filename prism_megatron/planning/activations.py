"""About how many bytes a pass keeps: arithmetic by which layouts are told apart before a step of any is played.

The counts are those of the device pass (``docs/device_pass.md``), taken apart by what they grow with. With H the hidden
size, Q = heads d and K = kv_heads d the widths of queries and of keys, F the MLP's, k of E experts W wide to a token, a
layer keeps for each of a rank's tokens, in bytes and bf16::

    attention and norms   8 H + (8 Q + 6 K + 8 heads + 4 kv_heads) / tp
    MLP                   6 F / tp                        nothing of it where the MLP is recomputed, and 2 H less
    experts               k (2 H etp + 12 W + 22) + 8 E   of them k 8 + E are left where they are recomputed
    everything recomputed 2 H

Sequence parallelism divides H by tp too. A context-parallel rank has keys and values of all others: 4 Q + 2 K for each
of their tokens. A trained block of the vision tower keeps 8 v + (14 v + 4 f) / tp of a patch, and 2 v where it is
recomputed. Beside that the output layer's chunk stands (``HEAD_CHUNK``), its weight's gradient in fp32, and the layer
whose backward pass runs. ``tests/integration/test_plan_plays.py`` holds the sum to plays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prism_megatron.forecast.plays import Case
from prism_megatron.planning.held import stage_of

HEAD_CHUNK = 4 * 2**27
"""Bytes of logits and of what is made of them, for a chunk of 2^25 logits."""


@dataclass(frozen=True)
class PassEstimate:
    """Bytes of a pass, by what they are."""

    kept: int
    """activations of the layers, of all micro-batches that a stage holds at once"""
    vision: int
    head: int
    """of the output layer, while the last micro-batch's loss is taken"""
    layer: int
    """of the layer that runs backward"""

    @property
    def peak(self) -> int:
        return self.kept + self.vision + max(self.head, self.layer)


def estimate_pass(case: Case) -> PassEstimate:
    """A pass of the case's rank over the longest rows there are."""
    stage, parallel = stage_of(case), case.parallel
    tokens = tokens_of_microbatch(case) / parallel.cp
    in_flight = min(parallel.pp - case.rank // (case.world_size // parallel.pp), _microbatches(case))
    # Interleaved stages start more micro-batches before the first one comes back (Narayanan et al., 2104.04473).
    more = 1 + (parallel.pp - 1) / (parallel.pp * parallel.vpp) if parallel.vpp > 1 else 1.0
    a_layer = layer_bytes(case, recompute=case.recompute.recompute, mlp=case.recompute.recomputes("mlp"))
    whole = layer_bytes(case, recompute="none", mlp=False)
    return PassEstimate(
        kept=round(in_flight * more * stage.layers * a_layer * tokens),
        vision=round(_vision_bytes(case)) if stage.is_first else 0,
        head=round(_head_bytes(case, tokens)) if stage.is_last else 0,
        layer=round(tokens * (1.6 * whole if a_layer < whole else 0.6 * whole)),
    )


def tokens_of_microbatch(case: Case) -> int:
    """Token slots that a micro-batch has: its budget, or one row that is longer."""
    work = case.work
    visual = 0 if work.image_grid is None else math.prod(work.image_grid) // case.shape.vision.merge**2
    longest = work.text_tokens + visual + work.answer_tokens
    there = work.rollouts * (work.answer_tokens + (0 if work.share_prompts else longest - work.answer_tokens))
    there += (longest - work.answer_tokens) * work.share_prompts
    if case.play == "judge":
        return max(longest, work.tokens_per_microbatch)
    return min(max(longest, work.tokens_per_microbatch), there * max(1, work.prompts))


def layer_bytes(case: Case, *, recompute: str, mlp: bool) -> float:
    """What a layer keeps for each token of the rank; ``mlp`` says that its MLP or experts are recomputed."""
    text, parallel = case.shape.text, case.parallel
    experts = case.towers is not None or text.experts is not None
    split = parallel.tp if parallel.sequence_parallel(experts=experts) else 1
    hidden, queries, keys = text.hidden, text.heads * text.head_dim, text.kv_heads * text.head_dim
    if recompute == "full":
        return 2 * hidden / split
    attention = (8 * queries + 6 * keys + 8 * text.heads + 4 * text.kv_heads) / parallel.tp
    attention += (parallel.cp - 1) * (4 * queries + 2 * keys) / parallel.tp
    if mlp:
        return 6 * hidden / split + attention
    if not experts:
        return 8 * hidden / split + attention + 6 * text.ffn / parallel.tp
    count, chosen, width = _experts(case)
    etp = parallel.expert_tp
    routed = chosen * (2 * hidden * etp + 12 * width + 22 * etp) + 8 * count
    return (8 * hidden + routed) / split + attention


def estimate_step(case: Case) -> int:
    """An optimizer's step beside what is held: two copies in fp32 of the largest parameter's share on the rank."""
    text, parallel, stage = case.shape.text, case.parallel, stage_of(case)
    shares = case.world_size // (parallel.pp * parallel.tp) if parallel.distributed_optimizer else 1
    largest = text.hidden * text.ffn * 2 / parallel.tp
    if stage.is_first or (stage.is_last and case.play != "judge"):
        largest = max(largest, text.vocab * text.hidden / parallel.tp)
    return round(8.2 * largest / shares)


def _experts(case: Case) -> tuple[int, int, int]:
    """Experts of a layer, those that see a token, and their width."""
    text = case.shape.text
    if case.towers is not None:
        return case.towers.num_experts, case.towers.top_k, text.ffn
    return text.num_experts, text.experts_per_token, text.expert_ffn


def _microbatches(case: Case) -> int:
    """That the played step has on a rank; a pipeline never holds more than it has stages."""
    return case.parallel.pp


def _head_bytes(case: Case, tokens: float) -> float:
    text = case.shape.text
    if case.play == "judge":
        return 8 * text.hidden * tokens
    return HEAD_CHUNK + 4 * text.vocab * text.hidden / case.parallel.tp + 8 * text.hidden * tokens


def _vision_bytes(case: Case) -> float:
    grid, vision = case.work.image_grid, case.shape.vision
    if grid is None:
        return 0.0
    patches = math.prod(grid) * max(1, round(tokens_of_microbatch(case) / _row(case)))
    taps = (1 + len(vision.taps)) * patches / vision.merge**2 * vision.out_hidden * 2
    if {"vision", "projector"} <= set(case.freeze):
        return taps
    block = 8 * vision.hidden + (14 * vision.hidden + 4 * vision.ffn) / case.parallel.tp
    if case.recompute.recompute_vision:
        block = 2 * vision.hidden
    return taps + patches * vision.depth * block


def _row(case: Case) -> int:
    grid, work = case.work.image_grid, case.work
    visual = 0 if grid is None else math.prod(grid) // case.shape.vision.merge**2
    return work.text_tokens + visual + work.answer_tokens * (work.rollouts if work.share_prompts else 1)
