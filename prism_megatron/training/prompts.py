"""What a run is played or taught on: scenes of the mini world, or records."""

from __future__ import annotations

from prism_megatron.config.data import DataConfig
from prism_megatron.data.loader import RecordSource, SceneSource
from prism_megatron.data.records import Part
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import Split


def build_prompts(
    data: DataConfig, renderer: Renderer, *, scenes: Split, part: Part = "train", batch_size: int, seed: int
) -> SceneSource | RecordSource:
    """Records of ``--data`` of their ``part``, or without it the mini world's ``scenes`` of that split.

    Raises DataError as ``RecordSource``.
    """
    if data.data is None:
        return SceneSource(renderer, split=scenes, seed=seed, batch_size=batch_size)
    return RecordSource(
        data.data,
        renderer,
        part=part,
        seed=seed,
        batch_size=batch_size,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
    )
