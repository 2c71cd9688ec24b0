"""What a rank runs to compare a checkpoint with the folder exported from it."""

from __future__ import annotations

from pathlib import Path

import torch

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine import checkpoint
from prism_megatron.engine.batch import Batch, beside_logits
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput, places_of
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.training.batches import supervised_batch
from prism_megatron.training.roles import batch_format


def checkpoint_logprobs(world: World, folder: Path, num_scenes: int) -> list[list[float]]:
    """Log-probs of the faithful answers to held-out scenes, by the policy of a checkpoint."""
    shape = Qwen3VLShape.from_folder(MINI_FOLDER / "policy")
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    policy = MegatronEngine(
        name="policy",
        provider=Qwen3VLProvider(shape),
        world=world,
        dtype=torch.float32,
        optimizer=MINI_ALIGN.policy,
        total_steps=1,
    )
    checkpoint.load(folder, {"policy": policy})
    examples = SceneSource(renderer, split="heldout", seed=0, batch_size=num_scenes).batch(0)
    rows = [renderer.training_row(example.prompt, example.reference) for example in examples]
    batch = supervised_batch([row for row, _ in rows], [mask for _, mask in rows], form=batch_format(renderer, world))

    def collect(output: VocabularyOutput, batch: Batch) -> LossOutput:
        targets = beside_logits(batch.input_ids_B_S, batch, world)
        logprobs, _ = output.scores(targets, places_of(torch.ones_like(targets)))
        return LossOutput(loss=logprobs.sum(), rows={"logprobs": logprobs})

    (output,) = policy.forward([batch], collect).rows
    masks = beside_logits(batch.extras["label_mask"], batch, world).bool()
    return [row[mask].tolist() for row, mask in zip(output["logprobs"], masks, strict=True)]
