"""Flags of precision and recompute reach both models, the format of their batches and the printed table.

Engines, rollout and the machine are fakes; the command line, the mini's folders and the providers are real.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model_providers.moe_discriminator.towers import Towers
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.commands.align import parse
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER, mini_folder
from prism_megatron.data.records import in_part, read_records
from prism_megatron.engine.host import execution
from prism_megatron.engine.host.capabilities import Installed
from prism_megatron.engine.host.fast_paths import FastPaths
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.game import discriminator
from prism_megatron.game.judged_rows import segment_row
from prism_megatron.run.session import Session
from prism_megatron.sampling.exam import ExamTimes
from prism_megatron.stages.align import build
from prism_megatron.training import prompts, roles
from prism_megatron.types import PERCEPTION, ImageInput, Prompt, Response, RolloutGroup, Segments, Span
from tests.integration.test_align_records import write_records

FLAGS = "--dtype bf16 --fp8 e4m3 --fp8-recipe blockwise --recompute full --recompute-vision"


class FakeEngine:
    """Keeps the provider, and the faster ways, it was given."""

    def __init__(self, *, provider: Any, fast: Any, **_keywords: Any) -> None:
        self.provider = provider
        self.fast = fast
        self.optimizer = "an optimizer"

    def load_hf(self, _source: Any) -> None:
        pass


@pytest.fixture
def run_on(monkeypatch: pytest.MonkeyPatch) -> Any:
    for module in (roles, discriminator):
        monkeypatch.setattr(module, "MegatronEngine", FakeEngine)
    monkeypatch.setattr(build, "build_rollout", lambda *_args, **_keywords: None)
    monkeypatch.setattr(build, "broadcast_object", lambda value, **_keywords: value)
    monkeypatch.setattr(build, "inner_optimizers", lambda _optimizer: [])
    monkeypatch.setattr(prompts, "all_gather_objects", lambda value: [value])
    sizes = {"parallel": ParallelConfig(), "layout": {}, "rank": 0, "world_size": 1, "gradient_ranks": 1}
    world: Any = SimpleNamespace(device=torch.device("cpu"), is_main=True, **sizes)

    def run(machine: Installed, flags: str) -> tuple[Any, list[str]]:
        monkeypatch.setattr(execution, "installed", lambda: machine)
        said: list[str] = []
        session = Session(world, Path())
        monkeypatch.setattr(session, "say", said.append)
        return build.build(parse(flags.split()), session), said

    return run


def test_flags_reach_both_models_and_their_batches(run_on: Any) -> None:
    run, said = run_on(Installed("2.13.0", (9, 0), transformer_engine="2.20.2"), FLAGS)
    for engine in (run.players.policy, run.players.discriminator):
        model = engine.provider.execution
        assert (model.precision.fp8, model.precision.fp8_recipe, model.layers) == ("e4m3", "blockwise", "te")
        assert (model.recompute.recompute, model.recompute.recompute_vision) == ("full", True)
    assert run.plan.judging.form.length_multiple == 16
    assert any(line.startswith("fp8") and "e4m3, blockwise" in line for line in said)


def test_faster_ways_reach_both_players_and_the_table(run_on: Any) -> None:
    """Claim: engine and layers of the policy and of the discriminator are given what the table says."""
    run, said = run_on(Installed("2.13.0"), "--overlap-grad-reduce on --overlap-param-gather on --fuse-swiglu on")
    for engine in (run.players.policy, run.players.discriminator):
        assert engine.fast == FastPaths(
            overlap_grad_reduce=True, overlap_param_gather=True, fuse_weight_gradients=True, fuse_swiglu=True
        )
        assert engine.provider.execution.fast == engine.fast
    assert any(line.startswith("gradient sums") and "during backward" in line for line in said)
    with pytest.raises(ConfigError, match="--fuse-permutation cannot be had here: layers are not Transformer Engine's"):
        run_on(Installed("2.13.0"), "--fuse-permutation on")


def test_defaults_keep_activations_and_use_torch_without_transformer_engine(run_on: Any) -> None:
    run, said = run_on(Installed("2.13.0"), "")
    for engine in (run.players.policy, run.players.discriminator):
        model = engine.provider.execution
        assert (model.precision.fp8, model.layers, model.recompute.recompute) == ("none", "torch", "none")
    assert run.plan.judging.form.length_multiple == 1
    assert any("Transformer Engine is not installed" in line for line in said)


@pytest.mark.parametrize(
    ("flags", "variant"),
    [
        ("", Variant(Towers())),
        ("--routing learned", Variant(Towers(1))),
        ("--routing dense", Variant(None)),
        ("--modality text", Variant(Towers(), "text")),
    ],
)
def test_every_kind_is_one_flag(run_on: Any, flags: str, variant: Variant) -> None:
    """Claim: the flag reaches the model, the batches, and the files that checkpoints keep; its size is told.

    The mini's shipped discriminator plays where it is that kind.
    """
    run, said = run_on(Installed("2.13.0"), flags)
    provider = run.players.discriminator.provider
    assert Variant(provider.towers, provider.modality) == variant
    section = json.loads(run.exports.models["discriminator"].files["config.json"])["prism_discriminator"]
    assert (section["routing"], section["modality"]) == (variant.routing, variant.modality)
    assert bool(run.plan.judging.form.unseen_token_ids) == (variant.modality == "text")
    (line,) = [line for line in said if line.startswith("discriminator:")]
    assert variant.as_flags() in line
    assert ("upcycled from the policy" in line) == (flags != "")


def test_a_discriminator_of_another_kind_is_refused(run_on: Any) -> None:
    folder = MINI_FOLDER / "discriminator"
    with pytest.raises(ConfigError, match="another kind; use --routing segment --modality multimodal --experts-per-"):
        run_on(Installed("2.13.0"), f"--routing learned --discriminator {folder}")


def test_a_discriminator_of_text_is_not_shown_images(run_on: Any) -> None:
    """Claim: neither pads nor their markers nor pictures, and the rest of the prompt in its order."""
    run, _ = run_on(Installed("2.13.0"), "--modality text")
    shape, form = run.players.policy.provider.shape, run.plan.judging.form
    assert (shape.vision_start_token_id, shape.image_token_id, shape.vision_end_token_id) == (495, 498, 496)
    picture = ImageInput(np.zeros((8, 1), dtype=np.float32), (1, 2, 4))
    prompt = Prompt("p", (7, 495, 498, 498, 496, 8), (picture,), "?")
    reference = Response((3, 4, 5), Segments(Span(0, 2), Span(2, 3), None))
    group = RolloutGroup(prompt=prompt, reference=reference, rollouts=())
    row = segment_row(group, reference, PERCEPTION, form)
    assert (row.token_ids, row.images) == ((7, 8, 3, 4, form.end_token_id), ())
    seen = segment_row(group, reference, PERCEPTION, dataclasses.replace(form, unseen_token_ids=frozenset()))
    assert (seen.token_ids[:6], seen.images) == (prompt.token_ids, prompt.images)


def test_fp8_without_transformer_engine_stops_the_run(run_on: Any) -> None:
    with pytest.raises(ConfigError, match="--fp8 e4m3 needs Transformer Engine"):
        run_on(Installed("2.13.0"), FLAGS)


def test_the_second_mini_world_plays_its_own_scenes_and_models(run_on: Any) -> None:
    """Claim: steps and probe ask scenes of that world, its shipped discriminator judges, and a fresh one is its base's.

    Records are judged by what the policy is made of.
    """
    shipped = mini_folder("drift")
    run, said = run_on(Installed("2.13.0"), "--mini drift --probe-every 5")
    asked = [*run.prompts.steps.batch(0), *run.prompts.probe.batch(0)]
    assert {(one.scene.world, one.scene.split) for one in asked} == {("drift", "align"), ("drift", "heldout")}
    assert any(f"from {shipped / 'discriminator'}" in line for line in said)
    assert run.plan.game.credit == "segment"
    assert "the mini (drift)" in run.exports.title
    _, said = run_on(Installed("2.13.0"), f"--mini drift --routing learned --model {MINI_FOLDER / 'policy'}")
    assert any(f"upcycled from {shipped / 'base'}" in line for line in said)
    run, _ = run_on(Installed("2.13.0"), "")
    assert {one.scene.world for one in run.prompts.steps.batch(0)} == {"habits"}


def test_held_out_scenes_are_asked_where_that_is_asked_for(run_on: Any) -> None:
    """Claim: of the world that is played, with draws of their own, at the run's steps; nobody is asked without."""
    flags = "--eval-prompts 6 --eval-every 7 --eval-rollouts 3 --steps 9 --save-every 4 --temperature 0.7 --seed 5"
    run, _ = run_on(Installed("2.13.0"), f"--mini drift {flags}")
    exam = run.prompts.exam
    assert {(one.scene.world, one.scene.split) for one in exam.examples} == {("drift", "heldout")}
    assert (len(exam.examples), exam.num_samples, exam.seed, exam.sampling.temperature) == (6, 3, 6, 0.7)
    assert exam.times == ExamTimes(steps=9, every=7, save_every=4)
    run, _ = run_on(Installed("2.13.0"), "")
    assert run.prompts.exam is run.players.rewarder is None


def sentences(folder: Path, *, but: int = 0) -> Path:
    """Forty records whose answers are sentences, all ``but`` every so many of them."""
    write_records(folder, 40)
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        if not but or number % but:
            line["answer"] = "There are two small circles to the left of a third one that is large."
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_held_out_records_are_those_that_can_be_checked(run_on: Any, tmp_path: Path) -> None:
    """Claim: their share is said, and no step asks them; a reward of one's own checks all."""
    data = sentences(tmp_path / "set", but=2)
    run, said = run_on(Installed("2.13.0"), f"--data {data} --format-sft 0 --eval-prompts 99 --prompts-per-step 4")
    asked = {one.record.id for one in run.prompts.exam.examples}
    held_out = [one for one in read_records(data, purpose="train") if in_part(one, "validation", validation_share=0.1)]
    can_be = {one.id for one in held_out if len(one.answer) < 9}
    assert 0 < len(can_be) < len(held_out) and asked == can_be
    share = len(can_be) / len(held_out)
    assert (
        f"held-out prompts: {len(can_be)} are asked; {share:.1%} of the records held out have an answer to check"
        in said
    )
    assert not asked & {one.record.id for one in run.prompts.steps.batch(0)}
    flags = f"--data {data} --format-sft 0 --eval-prompts 99 --reward tests.integration.rewards_for_rlvr:by_length"
    run, _ = run_on(Installed("2.13.0"), flags)
    assert {one.record.id for one in run.prompts.exam.examples} == {one.id for one in held_out}
    run.players.rewarder.close()


def test_records_that_cannot_be_checked_are_refused_before_a_weight_is_loaded(
    run_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sentences(tmp_path / "set")
    monkeypatch.setattr(roles, "MegatronEngine", None)
    with pytest.raises(
        DataError, match=r"--eval-prompts 8: .*data\.jsonl: no line is left .* no rule can check .*; leave"
    ):
        run_on(Installed("2.13.0"), f"--data {data} --format-sft 0 --eval-prompts 8")


def test_selected_scenes_come_again_every_epoch(run_on: Any, tmp_path: Path) -> None:
    """Claim: --prompts chooses the game's scenes, by id, and an id of another world is refused with its line."""
    path = tmp_path / "selected.jsonl"
    ids = [f"scene-drift-align-3-{index}" for index in range(4)]
    path.write_text("".join(f'{{"id": "{one}"}}\n' for one in ids))
    run, _ = run_on(Installed("2.13.0"), f"--mini drift --prompts-per-step 4 --prompts {path}")
    for step in range(3):
        assert sorted(example.prompt.id for example in run.prompts.steps.batch(step)) == ids
    path.write_text('{"id": "scene-align-3-0"}\n')
    with pytest.raises(DataError, match=r"selected\.jsonl:1: .* is no scene of the split 'align' of --mini drift"):
        run_on(Installed("2.13.0"), f"--mini drift --prompts {path}")
