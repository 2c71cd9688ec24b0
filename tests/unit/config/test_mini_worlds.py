"""``--mini`` on every command that takes it: recipes, weights and scenes of the world that is meant.

Blind spot: whether the recipes work; ``docs/mini_world.md`` has their figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands import align, rlvr, select_prompts, sft, warm_start
from prism_megatron.config.architecture.model import MiniWorld, ModelConfig
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.mini_world import MINI_FOLDER, make_mini_recipe, mini_folder
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.sft import MINI_SFT
from prism_megatron.config.stages.warm_start import MINI_WARM_START
from prism_megatron.conversion.checkpoints.model_names import policy_folder, title_of, upcycled_folder
from prism_megatron.errors import ConfigError

Parse = Callable[[Sequence[str]], Any]
STAGES: dict[str, Parse] = {
    "sft": sft.parse,
    "warm-start": warm_start.parse,
    "align": align.parse,
    "rlvr": rlvr.parse,
}


@pytest.mark.parametrize("stage", STAGES)
def test_without_the_flag_and_with_it_bare_the_first_world_is_meant(stage: str) -> None:
    """Claim: the recipe without flags is what it was, and ``--mini`` without a value changes nothing."""
    parse = STAGES[stage]
    assert parse([]).model == ModelConfig()
    assert parse(["--mini"]) == parse(["--mini", "habits"]) == parse([])
    assert parse(["--mini", "--steps", "3"]) == parse(["--steps", "3"])
    first = {"sft": MINI_SFT, "warm-start": MINI_WARM_START, "align": MINI_ALIGN}
    assert stage not in first or parse([]) == first[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_the_second_world_has_recipes_of_its_own(stage: str, tmp_path: Path) -> None:
    """Claim: by flag and by YAML, also beside a model of the user's own; flags win over what the recipe says."""
    parse = STAGES[stage]
    yaml = tmp_path / "run.yaml"
    yaml.write_text("model: {mini: drift}\n", encoding="utf-8")
    recipe = parse(["--mini", "drift"])
    assert recipe.model.mini == "drift"
    assert parse(["--config", str(yaml)]) == recipe
    assert parse(["--mini=drift", "--steps", "3"]).steps == 3
    own = parse(["--mini", "drift", "--model", "runs/sft"])
    assert own.model == ModelConfig("runs/sft", "drift")
    assert (own.data, own.steps, own.checkpoint) == (recipe.data, recipe.steps, recipe.checkpoint)
    alone = parse(["--model", "runs/sft", "--steps", "3"])
    assert alone.data.system_prompt is not None, "a model alone has the paper's recipe"


def test_the_second_worlds_rates_are_those_that_were_tried() -> None:
    """Claim: credit by segment, rates and sizes of the recipes, as the docs give them."""
    aligned = align.parse(["--mini", "drift"])
    assert (aligned.game.credit, aligned.policy.lr, aligned.discriminator_optimizer.lr) == ("segment", 1e-4, 5e-4)
    assert (aligned.steps, aligned.rollout.prompts_per_step, aligned.rollout.rollouts_per_prompt) == (40, 8, 8)
    warm = warm_start.parse(["--mini", "drift"])
    assert (warm.steps, warm.discriminator_optimizer.lr, warm.gate.min_auc) == (120, 7e-4, 0.8)
    reinforced = rlvr.parse(["--mini", "drift"])
    assert (reinforced.policy.lr, reinforced.rollout.prompts_per_step, reinforced.steps) == (1e-4, 8, 40)
    made = make_mini_recipe("drift")
    assert (made.world, made.pretrain.steps, made.sft.steps, made.warm_start.steps) == ("drift", 300, 120, 120)
    assert make_mini_recipe("habits").pretrain.steps == 1200


def test_a_world_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Claim: by flag and by YAML; the complaint names the worlds that there are."""
    with pytest.raises(SystemExit) as caught:
        align.parse(["--mini", "other"])
    assert caught.value.code == 2
    assert "habits" in capsys.readouterr().err
    yaml = tmp_path / "run.yaml"
    yaml.write_text("model: {mini: other}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.mini must be one of habits, drift, not 'other'"):
        align.parse(["--config", str(yaml)])


@pytest.mark.parametrize("mini", ["habits", "drift"])
def test_each_world_has_its_weights(mini: MiniWorld) -> None:
    """Claim: every folder that a stage begins with is there; a discriminator of ``drift`` begins as its base."""
    for name in ("base", "policy", "aligned"):
        folder = policy_folder(None, of_the_mini=name, mini=mini)
        assert folder == mini_folder(mini) / name
        assert (folder / "model.safetensors").is_file()
    assert mini_folder("habits") == MINI_FOLDER
    assert upcycled_folder("drift", scenes=True) == mini_folder("drift") / "base"
    assert upcycled_folder("drift", scenes=False) is upcycled_folder("habits", scenes=True) is None
    assert title_of(ModelConfig(mini=mini)) == ("the mini" if mini == "habits" else "the mini (drift)")
    assert title_of(ModelConfig("org/name@main", mini)) == "name"


def test_prompts_are_selected_from_scenes_too() -> None:
    """Claim: ``--mini`` alone asks scenes of that world; records still need a policy, and both together are refused."""
    config = select_prompts.parse(["--mini", "drift"])
    assert (config.mini, config.scenes, config.data.system_prompt, config.model) == ("drift", 256, None, None)
    assert select_prompts.parse(["--mini"]).mini == "habits"
    assert select_prompts.parse(["--mini", "drift", "--model", "runs/sft"]).scenes == 256
    with pytest.raises(ConfigError, match="--model is needed"):
        select_prompts.parse([])
    with pytest.raises(ConfigError, match="--model is needed"):
        select_prompts.parse(["--mini", "drift", "--data", "."])
    with pytest.raises(ConfigError, match="--scenes 5 are of the mini world, and --data names records"):
        select_prompts.parse(["--model", "x", "--data", ".", "--scenes", "5"])


def test_records_have_the_recipe_for_records() -> None:
    """Claim: with ``--data`` a world chooses weights alone: rates are those for records, and no scene is played."""
    assert align.parse(["--mini", "drift", "--data", "."]).data.format_sft == 150
    assert AlignConfig().data.format_sft == 0
