"""A registration says what is run; intervals and verdicts of its table are right on runs that are known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prism_megatron.config.experiments.effect import (
    Control,
    Primary,
    Regime,
    Registration,
    check_registration,
    read_registration,
)
from prism_megatron.config.experiments.effect_recipes import alignment_of, warm_start_of
from prism_megatron.config.yaml_file import write_yaml
from prism_megatron.data.scenes import make_scene
from prism_megatron.errors import ConfigError, PrismError
from prism_megatron.evaluation.bootstrap import Interval
from prism_megatron.experiments.effect import legs
from prism_megatron.experiments.effect.answers import (
    ALL_MEASURES,
    RESPONSES,
    Answers,
    read_answers,
    write_responses,
)
from prism_megatron.experiments.effect.drift import drift_of
from prism_megatron.experiments.effect.drift import lines_of as drift_lines
from prism_megatron.experiments.effect.prompts import _mixed
from prism_megatron.experiments.effect.run import settle, write_result
from prism_megatron.experiments.effect.seed import FAITHFUL, TAUGHT, arm_name, arms_of, folder_of, texts_of
from prism_megatron.experiments.effect.statistics import crossed_interval, verdict
from prism_megatron.experiments.effect.table import RELIANCE, document_of, pairs_of, text_of
from prism_megatron.sampling.scene_answers import MODES
from tests.conftest import REPOSITORY

REGISTERED = Registration(
    title="Two seeds",
    seeds=(7, 8),
    scenes=40,
    samples=2,
    variants=("segment", "text"),
    controls=("length", "lr0"),
    algorithms=("grpo", "gspo"),
    reinforced_once=("align text",),
    guessable=Regime(seeds=2, comparisons=0.9),
    informative=Regime(seeds=1, keep_from=0.2, keep_to=0.8),
)


def test_every_arm_of_a_seed_has_its_own_folder() -> None:
    """Claim: the second seed is not run in a regime of one, and one start goes through RLVR once."""
    first, second = (arms_of(REGISTERED, place) for place in (0, 1))
    assert first[:7] == ["base", "sft", "references", "align", "align text", "align length", "align lr0"]
    assert len(first) == 7 + 3 * 2 * 2 + 1
    assert set(first) - set(second) == {
        arm_name(start, algo, "informative") for start in ("sft", "align", "references") for algo in ("grpo", "gspo")
    }
    assert [arm for arm in first if arm.startswith("align text →")] == ["align text → grpo, guessable"]
    assert len({folder_of(Path("out"), 7, arm) for arm in first}) == len(first)


def test_every_comparison_is_of_arms_that_are_run_and_stands_once() -> None:
    pairs = pairs_of(REGISTERED)
    assert {arm for pair in pairs for arm in (pair.above, pair.than)} == set(arms_of(REGISTERED, 0))
    assert len({(pair.above, pair.than) for pair in pairs}) == len(pairs)
    assert [(pair.above, pair.than) for pair in pairs if pair.why == "primary"] == [
        (arm_name("align", algo, "guessable"), arm_name("sft", algo, "guessable")) for algo in ("grpo", "gspo")
    ]


def test_an_experiment_may_end_before_verifiable_rewards() -> None:
    """Claim: then the primary comparison is of two arms as they are, and nothing is reinforced."""
    early = replace(REGISTERED, guessable=Regime(), informative=Regime(), reinforced_once=(),
                    primary=Primary(regime=None, above="align", than="align length"))  # fmt: skip
    check_registration(early)
    assert arms_of(early, 0) == ["base", "sft", "references", *early.aligned]
    pairs = pairs_of(early)
    assert [(pair.above, pair.than) for pair in pairs if pair.why == "primary"] == [("align", "align length")]
    assert len({(pair.above, pair.than) for pair in pairs}) == len(pairs)
    with pytest.raises(ConfigError, match="'align dense' is not among align, align length"):
        check_registration(replace(early, primary=Primary(regime=None, than="align dense")))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"seeds": ()}, "seeds: there must be one"),
        ({"seeds": (1, 1)}, "twice"),
        ({"algorithms": ("ppo",)}, "ppo"),
        ({"reinforced": ("sft", "align", "align dense")}, "'align dense' is no arm"),
        ({"reinforced": ("sft",), "reinforced_once": ()}, "'align' is not among sft"),
        ({"align_comparisons": 0.9}, "a share of align_prompts"),
        ({"policy_steps": 40}, "must be more than align_steps 40"),
        ({"guessable": Regime(seeds=3)}, "more than the 2 that there are"),
        ({"guessable": Regime(seeds=2, comparisons=0.9, keep_from=0.2)}, "do not go together"),
        ({"reinforced_once": ("align",)}, "stands in reinforced too"),
        ({"reinforced": ("sft", "references"), "primary": Primary(above="references")}, "compared with 'align'"),
        ({"primary": Primary(above="sft")}, "compared with itself"),
        ({"informative": Regime(keep_from=0.8, keep_to=0.2)}, "keep_from 0.8 is more"),
        ({"informative": Regime(), "primary": Primary(regime="informative")}, "no seed is run in the regime"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_registered_is_refused(change: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_registration(replace(REGISTERED, **change))


def test_a_file_is_read_strictly_and_its_folder_holds_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "registration.yaml"
    path.write_text(write_yaml({"seeds": [3, 4], "guessable": {"seeds": 2, "comparisons": 0.5}}))
    registered = read_registration(path)
    assert (registered.seeds, registered.guessable.comparisons) == ((3, 4), 0.5)
    settle(tmp_path / "out", registered)
    settle(tmp_path / "out", registered)
    with pytest.raises(ConfigError, match="another registration"):
        settle(tmp_path / "out", replace(registered, scenes=5))
    path.write_text(write_yaml({"seed": [3]}))
    with pytest.raises(ConfigError, match="did you mean seeds"):
        read_registration(path)


def slow_interval(values: np.ndarray, *, draws: int, seed: int) -> Interval:
    """The same bootstrap, one resample at a time."""
    generator, means = np.random.default_rng(seed), []
    seeds, scenes = values.shape
    for _ in range(draws):
        rows, columns = generator.integers(seeds, size=seeds), generator.integers(scenes, size=scenes)
        means.append(values[rows][:, columns].mean())
    return Interval(float(values.mean()), *(float(end) for end in np.quantile(means, (0.025, 0.975))))


def test_an_interval_is_that_of_resampled_seeds_and_scenes() -> None:
    """0.01: what is left of chance in a quantile of 10,000 draws whose standard deviation is 0.1."""
    generator = np.random.default_rng(5)
    values = generator.normal(0.2, 1, (8, 50)) + generator.normal(0, 0.25, (8, 1)) + generator.normal(0, 0.3, (1, 50))
    found, slow = crossed_interval(values), slow_interval(values, draws=10_000, seed=11)
    np.testing.assert_allclose(found, slow, rtol=0, atol=0.01)


def test_intervals_hold_what_they_say_where_seeds_differ() -> None:
    """Claim: of 300 experiments of ten seeds whose true mean is 0, about one in twenty counts as a difference.

    Ten seeds make a bootstrap of seeds somewhat narrow: 0.08 is expected, and 0.13 are three standard errors above it.
    An interval over scenes alone would count most of them.
    """
    generator = np.random.default_rng(3)
    verdicts = [
        verdict(crossed_interval(generator.normal(0, 0.2, (10, 1)) + generator.normal(0, 0.5, (10, 64))))
        for _ in range(300)
    ]
    assert sum(one != "no difference shown" for one in verdicts) / len(verdicts) < 0.13
    scenes_alone = [
        verdict(crossed_interval(generator.normal(0, 0.2, (1, 1)) + generator.normal(0, 0.5, (1, 64))))
        for _ in range(100)
    ]
    assert sum(one != "no difference shown" for one in scenes_alone) > 30


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros(3), np.array([[1.0, np.nan]])])
def test_what_has_no_mean_has_no_interval(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite values"):
        crossed_interval(values)


def answers(level: float, seed: int) -> Answers:
    """Answers of which so many are right, the same ones in every seed but for a few."""
    generator = np.random.default_rng([seed, round(1000 * level)])
    shape = {"T=1": (REGISTERED.scenes, REGISTERED.samples), "greedy": (REGISTERED.scenes, 1)}
    return {
        mode: {
            measure: (generator.random(shape[mode]) < level).astype(float)
            for measure in (*ALL_MEASURES, *(RELIANCE if mode == "greedy" else ()))
        }
        for mode in MODES
    }


def runs_of(levels: Mapping[str, float]) -> dict[str, dict[int, Answers]]:
    return {
        arm: {seed: answers(levels.get(arm, 0.5), seed) for place, seed in enumerate(REGISTERED.seeds)
              if arm in arms_of(REGISTERED, place)}
        for arm in arms_of(REGISTERED, 0)
    }  # fmt: skip


def test_differences_are_of_the_same_scenes_and_seeds() -> None:
    """Claim: the better arm is above, the worse one below, and each difference is the mean over its seeds."""
    grpo, gspo = (arm_name("align", algo, "guessable") for algo in ("grpo", "gspo"))
    sft = arm_name("sft", "grpo", "guessable")
    runs = runs_of({grpo: 0.95, gspo: 0.05})
    done = {arm: {seed: {"commit": "abc", "train_seconds": 3000.0, "ask_seconds": 600.0, "last_step": {}}
                  for seed in by_seed} for arm, by_seed in runs.items()}  # fmt: skip
    document = document_of(REGISTERED, runs, done)
    better, worse = document["differences"][:2]
    assert [one["greedy/answer right"]["verdict"] for one in (better, worse)] == ["above", "below"]
    by_seed = [runs[grpo][seed]["T=1"]["answer right"].mean() - runs[sft][seed]["T=1"]["answer right"].mean()
               for seed in (7, 8)]  # fmt: skip
    assert better["T=1/answer right"]["by_seed"] == pytest.approx(by_seed, abs=1e-4)
    assert better["T=1/answer right"]["mean"] == pytest.approx(np.mean(by_seed), abs=1e-4)
    assert better["T=1/answer right"]["seed_std"] == pytest.approx(np.std(by_seed, ddof=1), abs=1e-4)
    informative = next(one for one in document["differences"] if one["above"].endswith("informative"))
    assert informative["seeds"] == [7]
    assert informative["greedy/answer right"]["verdict"] == "one seed, no claim"
    assert document["hours_of_arms"] == sum(len(by_seed) for by_seed in runs.values())
    text = text_of(REGISTERED, document)
    assert f"| primary | {grpo} | {sft} | 2 |" in text
    assert "**What was registered: does not hold.**" in text
    primary = text[text.index("## Primary") : text.index("## Comparisons")]
    assert f"* {grpo} less {sft}: " in primary and "above in 2 of 2 seeds" in primary and "above in 0 of 2" in primary
    json.dumps(document)


def test_one_seed_claims_nothing() -> None:
    one = replace(REGISTERED, seeds=(7,), guessable=Regime(seeds=1))
    runs = {arm: {7: answers(0.9 if arm.startswith("align") else 0.1, 7)} for arm in arms_of(one, 0)}
    done = {arm: {7: {"commit": "abc", "train_seconds": 1.0, "ask_seconds": 1.0, "last_step": {}}} for arm in runs}
    document = document_of(one, runs, done)
    verdicts = {value["verdict"] for pair in document["differences"] for name, value in pair.items() if "/" in name}
    assert verdicts == {"one seed, no claim"}
    text = text_of(one, document)
    assert "**One seed: no claim.**" in text and "**What was registered: no claim.**" in text


def test_no_result_is_written_of_arms_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="seed-7/base is not done"):
        write_result(tmp_path, REGISTERED)
    assert not list(tmp_path.iterdir())


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    given = answers(0.5, 1)
    document = {mode: {name: values.tolist() for name, values in of_mode.items()} for mode, of_mode in given.items()}
    (tmp_path / "answers.json").write_text(json.dumps(document))
    found = read_answers(tmp_path)
    for mode, of_mode in given.items():
        for name, values in of_mode.items():
            np.testing.assert_array_equal(found[mode][name], values)


@pytest.mark.parametrize(
    ("control", "flags"),
    [
        (None, {}),
        ("length", {"length_scores": True}),
        ("shuffled", {"shuffle_scores": True}),
        ("random", {"freeze_discriminator": True}),
        ("lr0", {"freeze_policy": True}),
    ],
)
def test_a_control_is_one_rule_from_alignment(control: Control | None, flags: dict[str, Any]) -> None:
    places: dict[str, Any] = {"policy": Path("p"), "discriminator": Path("d"), "prompts": None, "seed": 7}
    plain = alignment_of(REGISTERED, "segment", None, **places)
    arm = alignment_of(REGISTERED, "segment", control, **places)
    assert arm.config == replace(plain.config, game=replace(plain.config.game, **flags))
    assert arm.random_discriminator == (control == "random")
    assert (arm.config.seed, arm.config.steps, arm.config.policy.lr) == (7, 40, 1e-4)


def test_the_mix_of_questions_is_the_regime_s() -> None:
    """Claim: nine in ten are comparisons, in the order of the scenes that are drawn."""
    scenes = [make_scene("align", seed=3, index=i, world="drift") for i in range(400)]
    chosen = list(_mixed(iter(scenes), Regime(prompts=20, comparisons=0.9)))
    kinds = [scene.question.kind == "comparison" for scene in chosen]
    assert (len(chosen), sum(kinds)) == (20, 18)
    assert [scene.index for scene in chosen] == sorted(scene.index for scene in chosen)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "examples" / "effect").glob("*.yaml")), ids=lambda path: path.stem
)
def test_registered_files_can_be_run(path: Path) -> None:
    registered = read_registration(path)
    assert not set(registered.seeds) & {0, 42}, "development seeds"
    assert pairs_of(registered)[0].why == "primary"


def test_drift_is_from_the_right_texts(tmp_path: Path) -> None:
    """Claim: an arm's answers are held against the base's, the taught ones and the references; its own are not.

    Of every arm a response is as many items long as its place among the arms says, and the second seed's has one more.
    """
    both = replace(REGISTERED, seeds=(7, 8), guessable=Regime(seeds=2), informative=Regime())
    ids = [f"scene-{number}" for number in range(40)]

    def said(items: int) -> list[str]:
        caption = "\n".join(f"- red circle: {item}" for item in range(items)) or "nothing"
        return [f"<caption>\n{caption}\n</caption>\n<think>\nso\n</think>\n<answer>1</answer>"] * len(ids)

    for seed in both.seeds:
        for place, arm in enumerate(arms_of(both, 0)):
            folder_of(tmp_path, seed, arm).mkdir(parents=True)
            write_responses(folder_of(tmp_path, seed, arm) / RESPONSES, ids, said(place + seed - 4))
        write_responses(texts_of(tmp_path, seed, TAUGHT), [f"other-{id_}" for id_ in ids], said(1))
        write_responses(texts_of(tmp_path, seed, FAITHFUL), ids, said(2))
    drift = drift_of(tmp_path, both, None, workers=2)
    assert drift == drift_of(tmp_path, both, None)
    assert "base" not in drift["base"]
    for place, arm in enumerate(arms_of(both, 0)):
        for of_seed in (0, 1):
            found = {name: by["caption_items/wasserstein"][of_seed]["value"] for name, by in drift[arm].items()}
            wanted = {"taught": place + of_seed + 2, "faithful": place + of_seed + 1}
            assert found == wanted | ({"base": place} if place else {})
    lines = drift_lines(drift)
    assert len(lines) == 2 + len(arms_of(both, 0))
    assert lines[3].startswith("| sft | 1.000 | 0.000 | – | – | 3.500 |")


def test_what_is_registered_holds_where_every_algorithm_is_above() -> None:
    """Claim: one algorithm of two that is not above is enough for it not to hold."""
    arms = {
        (start, algo): arm_name(start, algo, "guessable") for start in ("align", "sft") for algo in ("grpo", "gspo")
    }
    better = {name: 0.95 if start == "align" else 0.05 for (start, _), name in arms.items()}
    for levels, outcome in ((better, "holds"), (better | {arms["align", "gspo"]: 0.05}, "does not hold")):
        runs = runs_of(levels)
        done = {arm: {seed: {"commit": "abc", "train_seconds": 1.0, "ask_seconds": 1.0, "last_step": {}}
                      for seed in by_seed} for arm, by_seed in runs.items()}  # fmt: skip
        text = text_of(REGISTERED, document_of(REGISTERED, runs, done))
        assert f"**What was registered: {outcome}.**" in text


def test_few_references_are_all_that_a_discriminator_sees() -> None:
    """Claim: with ``align_prompts`` warm-start and alignment are played on the same file."""
    paths: Any = {"policy": Path("p"), "prompts": Path("few.jsonl")}
    warm = warm_start_of(REGISTERED, "segment", target=Path("d"), seed=7, **paths)
    arm = alignment_of(REGISTERED, "segment", None, discriminator=Path("d"), seed=7, **paths)
    assert warm.prompts == arm.config.prompts == Path("few.jsonl")


def test_references_teach_what_alignment_teaches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Claim: the same scenes, rows a step, rate and steps as alignment has, and the vision tower learns in both."""
    taught: dict[str, Any] = {}
    monkeypatch.setattr(legs, "supervised", lambda *args, **keywords: taught.update(keywords, args=args))
    world: Any = None
    legs.Legs(REGISTERED, 7, world).learn_references(tmp_path, tmp_path, prompts=None, prompts_per_step=8)
    phase, _, _, lesson = taught["args"]
    arm = alignment_of(REGISTERED, "segment", None, policy=Path("p"), discriminator=Path("d"), prompts=None, seed=7)
    config = arm.config
    assert (phase.steps, phase.rows_per_step) == (config.steps, config.rollout.prompts_per_step)
    assert phase.optimizer == config.policy
    assert (lesson.scenes, lesson.split, lesson.teacher) == ("drift", "align", "faithful")
    assert lesson.vision and not config.model.freeze_policy_vision
    assert taught["seed"] == config.seed
