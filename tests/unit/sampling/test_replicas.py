"""Where replicas of the policy stand, what they are planned to take, and when that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from prism_megatron.commands.align import parse
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.presets import preset
from prism_megatron.errors import ConfigError
from prism_megatron.rollout.shared_prompt import SharedPrompts
from prism_megatron.sampling.replicas import ReplicaPlan, check_fits, end_token_ids, plan_replicas
from prism_megatron.sampling.shares import sample_share
from tests.mini_experts import write_mini_with_experts

MINI = Qwen3VLShape.from_folder(MINI_FOLDER / "policy")


def plan(flags: str = "", shape: Qwen3VLShape = MINI, *, world_size: int = 8, ranks_per_node: int = 4) -> ReplicaPlan:
    config = parse(flags.split())
    sizes, data = config.rollout, config.data
    return plan_replicas(sizes, data, shape, dtype=torch.bfloat16, world_size=world_size, ranks_per_node=ranks_per_node)


def test_small_models_are_on_every_rank_and_large_ones_once_a_node() -> None:
    assert plan().ranks == tuple(range(8))
    assert plan(shape=preset("2B")).ranks == (0, 4)
    assert plan("--rollout-embedded-ranks 3", preset("2B")).ranks == (0, 2, 5)
    assert plan("--rollout-embedded-ranks 1").ranks == (0,)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="--rollout-embedded-ranks 9 is more than the 8 ranks"):
        plan("--rollout-embedded-ranks 9")
    with pytest.raises(ConfigError, match="--rollout-embedded-ranks 0 must be at least 1"):
        parse(["--rollout-embedded-ranks", "0"])


def test_planned_weights_are_those_of_the_folder() -> None:
    with safe_open(Path(MINI_FOLDER) / "policy" / "model.safetensors", framework="pt") as file:
        elements = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # not a dict
    assert plan().weight_bytes == 2 * elements


def test_planned_weights_count_each_expert_once(tmp_path: Path) -> None:
    folder = write_mini_with_experts(tmp_path / "policy", "transformers")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        elements = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # not a dict
    assert plan(shape=Qwen3VLShape.from_folder(folder)).weight_bytes == 2 * elements


def test_the_planned_store_is_what_decoding_allocates() -> None:
    """All four prompts of a step and 3 samples of each on one rank, at the longest prompts and answers."""
    flags = "--prompts-per-step 4 --rollouts-per-prompt 3 --max-prompt-tokens 20 --max-response-tokens 6"
    planned = plan(flags, world_size=1, ranks_per_node=1).store_bytes
    prompts = torch.zeros(4, MINI.text.kv_heads, 20, MINI.text.head_dim)
    layers = [(prompts, prompts)] * MINI.text.num_layers
    store = SharedPrompts(layers, [3] * 4, num_new=6, padded_P_S=None)
    held = sum(tensor.nbytes for layer in store._layers for tensor in vars(layer).values())
    assert planned == held


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_planned_store_is_that_of_the_largest_share(count: int) -> None:
    """Eight prompts of five samples over some replicas: the share that reads most prompts has just the room it needs,
    where shares begin and end inside of a prompt as where they do not."""
    flags = "--prompts-per-step 8 --rollouts-per-prompt 5 --max-prompt-tokens 40 --max-response-tokens 3"
    planned = plan(f"{flags} --rollout-embedded-ranks {count}").store_bytes
    shares = [sample_share(8, 5, index=index, count=count) for index in range(count)]
    positions = [len(share.samples) * 40 + sum(map(len, share.samples)) * 3 for share in shares]
    text = MINI.text
    of_one = text.num_layers * text.kv_heads * (2 * text.head_dim + 1) * 4
    assert max(positions) * of_one <= planned <= (max(positions) + 2 * 40 + 5 * 3) * of_one


def test_what_does_not_fit_is_refused_with_its_figures() -> None:
    """Two of three replicas share a node's memory where there is no GPU, and have their own where there are."""
    wanted = ReplicaPlan((0, 1, 4), weight_bytes=3 * 10**9, store_bytes=10**9)
    check_fits(wanted, [8 * 10**9] * 8, ranks_per_node=4, shares_memory=True)
    check_fits(wanted, [4 * 10**9] * 8, ranks_per_node=4, shares_memory=False)
    with pytest.raises(ConfigError, match=r"3 GB of weights and up to 1 GB .* 2 of them .* 8 GB, and rank 0 has 7 GB"):
        check_fits(wanted, [7 * 10**9] * 8, ranks_per_node=4, shares_memory=True)
    with pytest.raises(ConfigError, match="rank 4 has 3 GB"):
        check_fits(wanted, [4 * 10**9] * 4 + [3 * 10**9] * 4, ranks_per_node=4, shares_memory=False)


@pytest.mark.parametrize(("named", "ends"), [(7, [7]), ([9, 7], [7, 9]), (None, [])])
def test_a_response_also_ends_where_the_folder_says(named: object, ends: list[int], tmp_path: Path) -> None:
    renderer: Any = SimpleNamespace(end_token_id=2)
    assert end_token_ids(tmp_path, renderer) == [2], "a folder need not say anything"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert end_token_ids(tmp_path, renderer) == [2, *ends]


@pytest.mark.parametrize("named", ["7", [7, "x"], True, 1.5, -1, {"a": 1}])
def test_ends_that_are_no_token_ids_are_named(named: object, tmp_path: Path) -> None:
    renderer: Any = SimpleNamespace(end_token_id=2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id is .*give a token id"):
        end_token_ids(tmp_path, renderer)
