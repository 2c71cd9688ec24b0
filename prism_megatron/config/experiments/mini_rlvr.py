"""The mini worlds' recipes for verifiable rewards, whatever the algorithm."""

from __future__ import annotations

from dataclasses import replace

from prism_megatron.config.architecture.model import MiniWorld, ModelConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.exam import ExamConfig
from prism_megatron.config.stages.rlvr import RLVRConfig

_SCENES = RLVRConfig(
    data=DataConfig(system_prompt=None, max_response_tokens=96),
    rollout=RolloutConfig(prompts_per_step=16, rollouts_per_prompt=8),
    exam=ExamConfig(eval_every=10, eval_prompts=256, eval_rollouts=2),
    checkpoint=CheckpointConfig(save_every=20),
    steps=40,
    tokens_per_microbatch=4096,
)
_MOST_UPDATES = 4
_OVERLONG_TOKENS = 24


def mini_rlvr(name: str, *, mini: MiniWorld = "habits", records: bool) -> RLVRConfig:
    """Scenes of a mini world, or ``records``, for the algorithm of that name, at rates and sizes for two CPU cores.

    What an algorithm states for models of billions of parameters gives way: its rate, its warm-up, its many updates a
    step and the length of its answers.
    """
    run = _SCENES.of(name)
    objective = replace(
        run.objective,
        mini_batches=min(run.objective.mini_batches, _MOST_UPDATES),
        token_budget=run.objective.token_budget and _SCENES.data.max_response_tokens,
    )
    policy = replace(run.policy, lr=1e-4, warmup_steps=0, warmup_ratio=0.0)
    run = replace(run, objective=objective, policy=policy, overlong_buffer=run.overlong_buffer and _OVERLONG_TOKENS)
    if mini == "drift":
        run = replace(run, model=ModelConfig(mini=mini), rollout=replace(run.rollout, prompts_per_step=8))
    if not records:
        return run
    # The mini knows scenes only: it first learns to keep the format on the set's images and questions. Its text is
    # spelled out byte by byte, hence longer answers.
    data = DataConfig(system_prompt=None, max_response_tokens=320, format_sft=150, format_sft_lr=2e-3)
    return replace(run, data=data)
