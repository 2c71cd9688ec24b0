"""What each phase of a step computes, reads and sends on one GPU.

All answers are as long as they may be, each prompt shows one image, and experts are chosen evenly: what a floor is a
floor of. Prompts are read once for all that goes on from them, in each phase. A GPU's share of the products is the
world's over its GPUs; what it reads is its own rank's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.forecast.plays import Case
from prism_megatron.forecast.workload import END_TOKEN, PAD_TOKEN, Workload, groups
from prism_megatron.game.scoring_plan import TrunkCost, plan_scoring
from prism_megatron.observability.model_flops import Arithmetic, Work
from prism_megatron.planning.activations import layer_bytes
from prism_megatron.planning.build import Batch, Run
from prism_megatron.planning.decoding import decoding
from prism_megatron.planning.floors import Phase
from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.held import held_by_part, stage_of, total
from prism_megatron.planning.links import traffic_of_pass
from prism_megatron.training.batches import BatchFormat


def phases_of(run: Run, gpu: Gpu) -> list[Phase]:
    """One step's, in their order."""
    planned, batch = run.planned(), run.batch()
    policy = planned.policy
    read = _read(batch, policy.shape.vision.merge, shared=run.stage != "sft")
    phases = []
    if run.rollout is not None:
        phases += decoding(run.rollout, policy, batch)
    if "discriminator" in planned.roles:
        phases.append(_judging(planned.roles["discriminator"], batch, gpu))
    if batch.measures:
        phases.append(_pass("old log-probs", policy, gpu, read, tokens=batch.tokens, learns=False))
    if planned.has_reference:
        phases.append(_pass("reference", policy, gpu, read, tokens=batch.tokens, learns=False))
    tokens = batch.sequences * (batch.prompt_tokens + batch.answer_tokens) if run.stage == "sft" else batch.tokens
    update = _pass("update of the policy", policy, gpu, read, tokens=tokens, learns=True)
    phases += (
        [replace(update, name=f"{update.name} {n + 1}") for n in range(batch.updates)]
        if batch.updates > 1
        else [update]
    )
    return phases


def arithmetic_of(case: Case) -> Arithmetic:
    """Of a role's layers: a discriminator's MLPs are the experts that see a token."""
    if case.towers is None:
        return Arithmetic.of(case.shape)
    text = replace(
        case.shape.text, num_experts=case.towers.num_experts, experts_per_token=case.towers.top_k,
        expert_ffn=case.shape.text.ffn,
    )  # fmt: skip
    return Arithmetic.of(replace(case.shape, text=text))


def _read(batch: Batch, merge: int, *, shared: bool) -> Work:
    """What the policy's pass goes through: prompts once, or with each answer."""
    prompt, answer = batch.prompt_tokens, batch.answer_tokens
    prompts = batch.prompts if shared else batch.sequences
    patches = 0 if batch.image_grid is None else math.prod(batch.image_grid)
    return Work(
        tokens=prompts * prompt + batch.sequences * answer,
        pairs=prompts * prompt * (prompt + 1) / 2 + batch.sequences * (answer * prompt + answer * (answer + 1) / 2),
        labels=batch.sequences * answer,
        patches=prompts * patches,
        patch_pairs=prompts * patches**2,
        merged=prompts * patches / merge**2,
    )


def _pass(name: str, case: Case, gpu: Gpu, read: Work, *, tokens: int, learns: bool) -> Phase:
    """A pass of the policy over the step's micro-batches, and the optimizer's step where it learns."""
    arithmetic = arithmetic_of(case)
    if learns:
        flops = arithmetic.training_flops(read, freeze=case.freeze, from_disk=0.0)
        flops += 2 * arithmetic.token * read.tokens * (case.recompute.recompute == "full")
    else:
        flops = 2 * (arithmetic.language(read) + arithmetic.tower(read) + arithmetic.projector(read))
    return _phase(name, case, gpu, flops=flops, tokens=tokens, learns=learns)


def _judging(case: Case, batch: Batch, gpu: Gpu) -> Phase:
    """Scores and update of the discriminator in one pass, by the plan that the step itself would make."""
    cost = judged(case, batch)
    arithmetic = arithmetic_of(case)
    # A tower reads a prompt, and from there the segments of that tower: halves of an answer, as in the play.
    segment = batch.answer_tokens / 2
    read = 2 * batch.prompts * (batch.answers + 1)
    pairs = 3 * (
        2 * batch.prompts * batch.prompt_tokens**2 / 2 + read * (segment * batch.prompt_tokens + segment**2 / 2)
    )
    flops = 2 * (arithmetic.token * cost.passes + arithmetic.pair * pairs)
    flops += 2 * arithmetic.token * cost.trunk_tokens * (case.recompute.recompute == "full")
    return _phase("score and train the discriminator", case, gpu, flops=flops, tokens=cost.trunk_tokens, learns=True)


def judged(case: Case, batch: Batch) -> TrunkCost:
    """What the step's own plan of micro-batches runs through the discriminator."""
    parallel = case.parallel
    ranks = case.world_size // parallel.model_parallel_size
    work = Workload(
        prompts=batch.prompts, rollouts=batch.answers, text_tokens=batch.prompt_tokens, image_grid=None,
        answer_tokens=batch.answer_tokens, tokens_per_microbatch=case.work.tokens_per_microbatch,
    )  # fmt: skip
    multiple = PrecisionConfig().length_multiple(parallel)
    return _judged(case.shape, work, multiple, ranks, ranks * parallel.microbatches_of_a_rank)


@lru_cache(maxsize=256)
def _judged(shape: Qwen3VLShape, work: Workload, multiple: int, ranks: int, rounds_of: int) -> TrunkCost:
    form = BatchFormat(PAD_TOKEN, END_TOKEN, multiple, torch.device("cpu"), share_prompts=True)
    plan = plan_scoring(
        groups(shape, work), form, tokens_per_microbatch=work.tokens_per_microbatch, rounds_of=rounds_of, ranks=ranks
    )
    return plan.cost


def _phase(name: str, case: Case, gpu: Gpu, *, flops: float, tokens: int, learns: bool) -> Phase:
    parallel = case.parallel
    ranks = case.world_size // parallel.model_parallel_size
    microbatches = max(1, math.ceil(tokens / ranks / case.work.tokens_per_microbatch))
    each = tokens / ranks / microbatches
    held = total(held_by_part(case))
    again = learns and case.recompute.recompute == "full"
    # Weights are read once forward, once backward; a gradient is read and written; then AdamW touches all it has.
    hbm: float = microbatches * (held.parameters * (1 + learns + again) + 2 * held.gradients * learns)
    if learns:
        kept = layer_bytes(case, recompute=case.recompute.recompute, mlp=case.recompute.recomputes("mlp"))
        hbm += held.gradients + 2 * held.optimizer
        hbm += 2 * microbatches * kept * stage_of(case).layers * each / parallel.cp
    return Phase(
        name,
        flops=flops / case.world_size,
        hbm=hbm,
        traffic=traffic_of_pass(case, gpu, tokens=each, microbatches=microbatches, learns=learns),
        waits=1 + (parallel.pp - 1) / (microbatches * parallel.vpp),
    )
