"""The embedded engine against transformers itself: same tokens when greedy, same log-probs, weights taken exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.conversion.announced_weights import AnnouncedWeights
from prism_megatron.errors import ConfigError, DataError, PrismError, WeightSyncError
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.types import Segments
from tests.counting import Counting
from tests.unit.rollout.oracle import forced_logprobs, model_inputs
from tests.unit.rollout.tiny_qwen import END, EXPERTS, IMAGE, VIDEO, NoSegments, prompt, tiny_model, unequal_prompts

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
LOGPROB_TOLERANCE = 1e-4


def engine_for(folder: Path, **options: Any) -> EmbeddedRollout:
    return EmbeddedRollout(folder, NoSegments(), end_token_ids=[END], device=CPU, **options)


def policy_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What an export gives: every weight once, without the tied head."""
    return ((name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, EmbeddedRollout]]:
    """A dense model and one with experts, and an engine with the weights of each."""
    built = {}
    for kind, text in (("dense", {}), ("experts", EXPERTS)):
        folder = tmp_path_factory.mktemp(kind)
        model = tiny_model(folder, **text)
        engine = engine_for(folder)
        engine.update_weights(policy_weights(model), version=3)
        built[kind] = (model, engine)
    return built


@pytest.fixture(scope="module")
def world(worlds: dict[str, tuple[Any, EmbeddedRollout]]) -> tuple[Any, EmbeddedRollout]:
    return worlds["dense"]


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_greedy_tokens_are_those_of_transformers_generate(
    worlds: dict[str, tuple[Any, EmbeddedRollout]], kind: str
) -> None:
    model, engine = worlds[kind]
    prompts = unequal_prompts()
    for prompt_, (rollout,) in zip(
        prompts, engine.generate(SampleRequest(prompts, 1, GREEDY, seed=0, step=0)), strict=True
    ):
        expected = model.generate(
            **model_inputs(prompt_),
            do_sample=False,
            max_new_tokens=GREEDY.max_new_tokens,
            suppress_tokens=[IMAGE, VIDEO],
            eos_token_id=END,
            pad_token_id=END,
        )[0, len(prompt_.token_ids) :]
        assert rollout.token_ids == tuple(expected.tolist())


@pytest.mark.parametrize(("kind", "temperature"), [("dense", 1.0), ("dense", 0.7), ("experts", 0.7)])
def test_logprobs_are_those_of_a_teacher_forced_forward(
    worlds: dict[str, tuple[Any, EmbeddedRollout]], kind: str, temperature: float
) -> None:
    """Rows leave the batch as they end, so a row's experts are those of its own state, whoever stands beside it."""
    model, engine = worlds[kind]
    prompts = unequal_prompts()
    groups = engine.generate(
        SampleRequest(prompts, 5, Sampling(temperature=temperature, max_new_tokens=40), seed=1, step=2)
    )
    for prompt_, group in zip(prompts, groups, strict=True):
        for rollout in group:
            forced = forced_logprobs(model, prompt_, rollout, temperature)
            torch.testing.assert_close(
                torch.tensor(rollout.logprobs).double(), forced, atol=LOGPROB_TOLERANCE, rtol=0.0
            )


def test_a_response_ends_at_the_end_token_or_is_cut(world: tuple[Any, EmbeddedRollout]) -> None:
    _, engine = world
    rollouts = [
        r
        for g in engine.generate(SampleRequest(unequal_prompts(), 16, Sampling(max_new_tokens=60), seed=5, step=0))
        for r in g
    ]
    reasons = {rollout.finish_reason for rollout in rollouts}
    assert reasons == {"stop", "length"}, "blind: this seed must show both"
    for rollout in rollouts:
        assert END not in rollout.token_ids[:-1]
        assert (rollout.token_ids[-1] == END) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.token_ids) == 60
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert rollout.policy_version == 3
        assert rollout.segments.problem == f"{len(rollout.token_ids)} tokens"


def test_every_answer_is_counted_when_it_ends(world: tuple[Any, EmbeddedRollout], tmp_path: Path) -> None:
    """Claim: whether it ends by itself, leaves the batch early or is cut, and over several batches."""
    model, _ = world
    model.config.save_pretrained(tmp_path)
    engine = EmbeddedRollout(tmp_path, NoSegments(), end_token_ids=[END], device=CPU, rows_per_batch=20)
    engine.update_weights(policy_weights(model), version=3)
    engine.activity = activity = Counting()
    prompts = unequal_prompts()
    engine.generate(SampleRequest(prompts, 16, Sampling(max_new_tokens=60), seed=5, step=0))
    count = 16 * len(prompts)
    assert activity.counted == [("answers", count, count)]


class CutAt:
    """A finder that gives a response up at the first token below 20 after its third."""

    def find(self, token_ids: Sequence[int]) -> Segments:
        return NoSegments().find(token_ids)

    def watch(self) -> CutAt:
        return CutAt()

    num_seen = 0

    def add(self, token_id: int) -> bool:
        self.num_seen += 1
        return self.num_seen > 3 and token_id < 20


def test_a_response_sampled_in_vain_ends_there(world: tuple[Any, EmbeddedRollout], tmp_path: Path) -> None:
    """The same draws as without a watch, cut after the token that it names."""
    model, engine = world
    model.config.save_pretrained(tmp_path)
    cutting = EmbeddedRollout(tmp_path, CutAt(), end_token_ids=[END], device=CPU)
    cutting.update_weights(policy_weights(model), version=3)
    prompts, sampling = unequal_prompts(), Sampling(max_new_tokens=30)
    kinds = set()
    for whole, cut in zip(
        *(e.generate(SampleRequest(prompts, 8, sampling, seed=5, step=0)) for e in (engine, cutting)), strict=True
    ):
        for before, after in zip(whole, cut, strict=True):
            named = [t for t, token in enumerate(before.token_ids) if t >= 3 and token < 20]
            length = named[0] + 1 if named else len(before.token_ids)
            kinds.add((bool(named), before.finish_reason))
            assert after.token_ids == before.token_ids[:length]
            assert len(after.logprobs) == length
            assert after.finish_reason == ("stop" if named else before.finish_reason)
    assert {(True, "length"), (True, "stop"), (False, "stop")} <= kinds, f"blind: this seed shows only {kinds}"


def test_samples_do_not_depend_on_how_prompts_are_split(world: tuple[Any, EmbeddedRollout], tmp_path: Path) -> None:
    """Over ranks, over decode batches; each prompt keeps its number in the step."""
    model, engine = world
    prompts = unequal_prompts()
    sampling = Sampling(max_new_tokens=30)
    whole = engine.generate(SampleRequest(prompts, 4, sampling, seed=7, step=9))
    halves = [
        *engine.generate(SampleRequest(prompts[:1], 4, sampling, seed=7, step=9)),
        *engine.generate(SampleRequest(prompts[1:], 4, sampling, seed=7, step=9, prompt_offset=1)),
    ]
    model.config.save_pretrained(tmp_path)
    narrow = engine_for(tmp_path, rows_per_batch=5)
    narrow.update_weights(policy_weights(model), version=3)
    one_by_one = narrow.generate(SampleRequest(prompts, 4, sampling, seed=7, step=9))
    tokens = [[r.token_ids for r in group] for group in whole]
    assert [[r.token_ids for r in group] for group in halves] == tokens
    assert [[r.token_ids for r in group] for group in one_by_one] == tokens


def test_any_samples_of_any_prompts_can_be_drawn(world: tuple[Any, EmbeddedRollout]) -> None:
    """Unequal numbers of rows a prompt, in one batch and in several: each row is the one of the whole draw."""
    _, engine = world
    prompts, sampling = unequal_prompts(), Sampling(max_new_tokens=60)
    whole = engine.generate(SampleRequest(prompts, 6, sampling, seed=5, step=1))
    wanted = [range(4, 6), range(6), range(1)]
    part = engine.generate(SampleRequest(prompts[1:], 6, sampling, seed=5, step=1, prompt_offset=1, samples=wanted))
    for drawn, group, numbers in zip(part, whole[1:], wanted, strict=True):
        assert [r.token_ids for r in drawn] == [group[i].token_ids for i in numbers]
    assert len({len(r.token_ids) for drawn in part for r in drawn}) > 2, "blind: rows must leave at different times"


def test_seed_step_and_sample_all_change_the_draw(world: tuple[Any, EmbeddedRollout]) -> None:
    _, engine = world
    sampling = Sampling(max_new_tokens=20)
    draws = {
        rollout.token_ids
        for seed, step in ((0, 0), (1, 0), (0, 1))
        for rollout in engine.generate(SampleRequest([prompt(1)], 3, sampling, seed=seed, step=step))[0]
    }
    assert len(draws) == 9


def test_placeholders_are_never_sampled(tmp_path: Path) -> None:
    """An image pad in a response would ask the trainer for an image that is not there."""
    model = tiny_model(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[IMAGE] *= 50.0
    engine = engine_for(tmp_path)
    engine.update_weights(policy_weights(model), version=0)
    for sampling in (Sampling(max_new_tokens=30), GREEDY, Sampling(top_p=0.5, max_new_tokens=30)):
        for group in engine.generate(SampleRequest([prompt(2)], 8, sampling, seed=0, step=0)):
            assert all(not {IMAGE, VIDEO} & set(rollout.token_ids) for rollout in group)


@pytest.mark.parametrize(("kind", "text"), [("dense", {}), ("experts", EXPERTS)])
def test_updated_weights_are_used(
    worlds: dict[str, tuple[Any, EmbeddedRollout]], kind: str, text: dict[str, Any], tmp_path: Path
) -> None:
    """Every weight counts: the second model's log-probs come out, in the same engine."""
    other = tiny_model(tmp_path, seed=1, **text)
    engine = engine_for(tmp_path)
    for version, model in ((0, worlds[kind][0]), (1, other)):
        engine.update_weights(policy_weights(model), version)
        (rollout,) = engine.generate(
            SampleRequest([prompt(2, (4, 4))], 1, Sampling(max_new_tokens=12), seed=0, step=0)
        )[0]
        forced = forced_logprobs(model, prompt(2, (4, 4)), rollout, 1.0)
        torch.testing.assert_close(torch.tensor(rollout.logprobs).double(), forced, atol=LOGPROB_TOLERANCE, rtol=0.0)
        assert rollout.policy_version == version == engine.policy_version


def test_an_untied_head_is_a_weight_of_its_own(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, tie_word_embeddings=False)
    engine = engine_for(tmp_path)
    with pytest.raises(WeightSyncError, match=r"1 of \d+ .* lm_head\.weight"):
        engine.update_weights(policy_weights(model), version=0)
    engine.update_weights(model.state_dict().items(), version=0)
    (rollout,) = engine.generate(SampleRequest([prompt(1)], 1, Sampling(max_new_tokens=12), seed=0, step=0))[0]
    forced = forced_logprobs(model, prompt(1), rollout, 1.0)
    torch.testing.assert_close(torch.tensor(rollout.logprobs).double(), forced, atol=LOGPROB_TOLERANCE, rtol=0.0)


def test_decode_batches_are_as_full_as_they_may_be(tmp_path: Path) -> None:
    """Prompts of 3, 3, 3, 7, 1 and 5 rows where 6 are allowed: the first two fit exactly, and 7 stand alone."""
    tiny_model(tmp_path)
    batches = engine_for(tmp_path, rows_per_batch=6)._batches([3, 3, 3, 7, 1, 5])
    assert list(batches) == [range(2), range(2, 3), range(3, 4), range(4, 6)]


def test_only_what_has_come_before_may_be_left_out(tmp_path: Path) -> None:
    """A replica's weights are uninitialised at first; what is neither sent nor left out is missing all the same."""
    old, new = (dict(policy_weights(tiny_model(tmp_path, seed=seed))) for seed in (0, 1))
    vision = frozenset(name for name in old if ".visual." in name)
    engine = engine_for(tmp_path)

    def changed(*without: str) -> AnnouncedWeights:
        sent = {name: tensor for name, tensor in new.items() if name not in vision | set(without)}
        return AnnouncedWeights({name: tuple(t.shape) for name, t in sent.items()}, iter(sent.items()), left_out=vision)

    with pytest.raises(WeightSyncError, match="the replica has none"):
        engine.update_weights(changed(), 0)
    engine.update_weights(old.items(), 1)
    engine.update_weights(changed(), 2)
    assert engine.policy_version == 2
    held = engine._model.state_dict()
    assert all(torch.equal(held[name], (old if name in vision else new)[name]) for name in old)
    with pytest.raises(WeightSyncError, match=rf"were not sent: {NORM}"):
        engine.update_weights(changed(NORM), 3)
    with pytest.raises(WeightSyncError, match="the replica has none"):
        engine.update_weights(changed(), 4)


NORM = "model.language_model.norm.weight"
MERGER = "model.visual.merger.linear_fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(MERGER), r"1 of \d+ weights .* were not sent: model\.visual\.merger\.linear_fc1\.weight"),
        (lambda w: w.update({"model.extra": torch.zeros(1)}), r"has no weight 'model\.extra'"),
        (lambda w: w.update({NORM: w[NORM][:16]}), r"has shape \(16,\), the rollout model's is \(32,\)"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(96, 32)}), "tied to the embedding"),
    ],
    ids=["missing", "unknown", "misshapen", "tied head differs"],
)
def test_weights_that_are_not_the_models_are_refused_and_nothing_can_be_sampled(
    tmp_path: Path, change: Any, message: str
) -> None:
    model = tiny_model(tmp_path)
    engine = engine_for(tmp_path)
    engine.update_weights(model.state_dict().items(), version=0)
    weights = dict(policy_weights(model))
    change(weights)
    with pytest.raises(WeightSyncError, match=message):
        engine.update_weights(weights.items(), version=1)
    assert engine.policy_version is None
    with pytest.raises(WeightSyncError, match="no complete set of weights"):
        engine.generate(SampleRequest([prompt(1)], 1, GREEDY, seed=0, step=0))


def test_a_weight_sent_twice_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    with pytest.raises(WeightSyncError, match="sent twice"):
        engine_for(tmp_path).update_weights([(NORM, model.state_dict()[NORM])] * 2, version=0)


def test_bad_requests_and_diverged_weights_are_named(world: tuple[Any, EmbeddedRollout], tmp_path: Path) -> None:
    _, engine = world
    with pytest.raises(DataError, match="'p1' has 10 tokens"):
        engine.generate(SampleRequest([prompt(1)], 1, Sampling(max_new_tokens=247), seed=0, step=0))
    assert engine.generate(SampleRequest([prompt(1)], 1, Sampling(max_new_tokens=246), seed=0, step=0)), (
        "all 256 may be filled"
    )
    with pytest.raises(ConfigError, match="end token"):
        EmbeddedRollout(tmp_path, NoSegments(), end_token_ids=[], device=CPU)
    model = tiny_model(tmp_path)
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(torch.nan)
    broken = engine_for(tmp_path)
    broken.update_weights(policy_weights(model), version=8)
    with pytest.raises(PrismError, match=r"version 8 .* not finite"):
        broken.generate(SampleRequest([prompt(1)], 1, Sampling(max_new_tokens=4), seed=0, step=0))


def test_prompts_are_told_of_as_they_are_finished(tmp_path: Path) -> None:
    """Claim: each once, with its own answers, the first ones before the last batch is drawn."""
    model = tiny_model(tmp_path)
    engine = engine_for(tmp_path, rows_per_batch=4)
    engine.update_weights(policy_weights(model), version=3)
    told: list[tuple[int, Any]] = []
    request = SampleRequest(
        unequal_prompts()[:3], 2, Sampling(max_new_tokens=6), seed=5, step=1, finished=lambda *one: told.append(one)
    )
    drawn = engine.generate(request)
    assert told == list(enumerate(drawn))
