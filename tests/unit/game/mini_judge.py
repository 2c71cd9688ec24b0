"""The mini's discriminator on a world of one rank, and answers for it to judge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.teachers import write
from prism_megatron.engine import runtime
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.roles import batch_format
from prism_megatron.types import Response
from tests.mini_players import mini_discriminator

POLICY = MINI_FOLDER / "policy"


@dataclass(frozen=True, eq=False)
class MiniJudge:
    """What judging needs. The engine has an optimizer, so a step that is not meant to train could."""

    world: World
    renderer: Renderer
    engine: MegatronEngine
    form: BatchFormat

    def digest(self) -> str:
        """Of all weights and moments."""
        found = hashlib.sha256()
        for name, tensor in self.engine.export_hf():
            found.update(name.encode() + tensor.numpy().tobytes())
        assert self.engine.optimizer is not None
        for part in self.engine.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                found.update(b"".join(state[moment].numpy().tobytes() for moment in ("exp_avg", "exp_avg_sq")))
        return found.hexdigest()


@contextmanager
def mini_judge() -> Iterator[MiniJudge]:
    """A world of one for as long as it is needed."""
    world = runtime.start(ParallelConfig(), seed=1)
    renderer = Renderer.from_folder(POLICY)
    engine = mini_discriminator(world)
    try:
        yield MiniJudge(world, renderer, engine, batch_format(renderer, world))
    finally:
        runtime.stop(world)


def scenes(renderer: Renderer, batch_size: int, *, seed: int = 5) -> SceneSource:
    """Held-out prompts with faithful references."""
    return SceneSource(renderer, split="heldout", seed=seed, batch_size=batch_size)


def answer(example: Example, renderer: Renderer, number: int, *, valid: bool = True) -> Response:
    """Answer ``number`` to an example, as a sloppy teacher gives it; cut short where it is not to be valid."""
    assert example.scene is not None
    whole = renderer.response(*write(example.scene, "sloppy", seed=number))
    if valid:
        return whole
    tokens = whole.token_ids[:9]
    return Response(tokens, renderer.segment_finder.find(tokens))
