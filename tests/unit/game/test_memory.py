"""What a checkpoint keeps of a game beside the weights."""

from __future__ import annotations

import json

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.game.controls import Observation
from prism_megatron.game.memory import GameMemory
from prism_megatron.game.replay import ReplayBuffer
from tests.unit.game.test_replay import played, prompts, seen


def test_a_memory_comes_back_whole_from_json() -> None:
    """Claim: the discriminator still pauses, and the groups replayed next are the same; both without replay too."""
    for replayed in (2, 0):
        game = GameConfig(pause_discriminator_above=0.5, replay_prompts=replayed, rollbacks=2)
        memory, restored = GameMemory.fresh(game, seed=4), GameMemory.fresh(game, seed=4)
        memory.controls.observe(0, Observation({"perception": 0.9}, {"perception": 1.0}, 0.8, True))
        memory.replay.add(0, played(0))
        restored.restore(json.loads(json.dumps(memory.to_plain())), prompts)
        assert restored.controls.decide(1).discriminator_updates == 0
        assert seen(restored.replay.draw(1)) == seen(memory.replay.draw(1))
        assert len(memory.replay.draw(1)) == replayed


def test_draws_follow_the_run_s_seed() -> None:
    game = GameConfig(replay_prompts=1, replay_steps=5)
    expected, memories = ReplayBuffer(game, seed=4), [GameMemory.fresh(game, seed=seed) for seed in (4, 5)]
    for step in range(5):
        for buffer in (expected, *(memory.replay for memory in memories)):
            buffer.add(step, played(step))
    same, other = ([seen(memory.replay.draw(step)) for step in range(30)] for memory in memories)
    assert same == [seen(expected.draw(step)) for step in range(30)] != other
