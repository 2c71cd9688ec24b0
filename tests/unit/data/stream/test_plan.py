"""A plan shows every sample as often as it should, whatever the layout, and goes on from where it was."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.data.conversation import Conversation, Picture, Turn
from prism_megatron.data.index.samples import SampleCounts, Samples, repeats_by_weight
from prism_megatron.data.records import read_records
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.segments import response_text
from prism_megatron.data.stream import plan as planning
from prism_megatron.data.stream.mixture import Mixture
from prism_megatron.data.stream.plan import START, Cost, Packing, Plan, Position
from prism_megatron.errors import DataError

COST = Cost(token=1.0, token_pair=0.001, visual_token=0.5)


@pytest.fixture(autouse=True)
def _small_windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "shared_dir" not in request.fixturenames:
        monkeypatch.setattr(planning, "WINDOW", 32)


def samples_of_lengths(lengths: Any, sources: Any = None, visual: Any = None) -> Samples:
    """Samples without records behind them."""
    lengths = np.asarray(lengths, dtype=np.int32)
    visual = np.zeros_like(lengths) if visual is None else np.asarray(visual, dtype=np.int32)
    source = np.zeros_like(lengths) if sources is None else np.asarray(sources, dtype=np.int32)
    names = tuple("abcdefgh"[: source.max() + 1])
    rows = np.arange(len(lengths), dtype=np.int32)
    counts = SampleCounts(len(lengths), 0, 0, 0)
    zeros = np.zeros(len(lengths), dtype=np.int16)
    return Samples((), zeros, rows, lengths - visual, visual, lengths // 2, source, names, counts)


def plan_of(samples: Samples, *, repeats: Any = None, seed: int = 3, epochs: int = 1, **packing: Any) -> Plan:
    how = Packing(**{"budget": 256, "multiple": 1} | packing)
    return Plan(samples, Mixture(samples, repeats or {}, seed=seed), packing=how, seed=seed, epochs=epochs)


def drawn(count: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3.5, 0.8, count), 4, 256).astype(np.int32)
    return samples_of_lengths(lengths, rng.integers(0, 3, count), (lengths * rng.uniform(0, 0.9, count)).astype(int))


def shown(plan: Plan, *, packs_per_step: int, start: Position = START) -> list[int]:
    return [int(sample) for step in plan.steps(packs_per_step, start) for pack in step.packs for sample in pack]


def test_every_sample_comes_once_an_epoch_in_a_new_order() -> None:
    """Claim: counted; packs keep the budget in rounded slots; the numbers of packs and steps are known up front."""
    samples = drawn(150)
    plan = plan_of(samples, epochs=2, multiple=8)
    steps = list(plan.steps(4))
    assert len(steps) == plan.num_steps(4) and plan.num_packs == sum(len(step.packs) for step in steps)
    assert all(len(step.packs) == 4 or step.after[1:] == (0, 0) for step in steps), "only an epoch's last step is short"
    order = shown(plan, packs_per_step=4)
    assert sorted(order[:150]) == sorted(order[150:]) == list(range(150)) and order[:150] != order[150:]
    for step in steps:
        for pack in step.packs:
            assert sum(-(-int(samples.tokens[sample]) // 8) * 8 for sample in pack) <= 256
    assert steps[-1].after == Position(2, 0, 0) and plan.num_steps(4, steps[-1].after) == 0


def test_the_seed_and_nothing_else_decides_the_order() -> None:
    again = [shown(plan_of(drawn(100)), packs_per_step=size) for size in (4, 4, 7)]
    assert again[0] == again[1] == again[2]
    assert again[0] != shown(plan_of(drawn(100), seed=4), packs_per_step=4)


@settings(deadline=None, max_examples=40)
@given(stops=st.lists(st.integers(0, 30), max_size=4), sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_a_run_goes_on_from_any_step(stops: list[int], sizes: list[int]) -> None:
    """Claim: cut after any steps, with other numbers of packs to a step in each piece, the samples are the same."""
    whole = shown(plan_of(drawn(200), epochs=2), packs_per_step=4)
    pieces: list[int] = []
    position = START
    for stop, packs_per_step in zip(stops, sizes, strict=False):
        plan = plan_of(drawn(200), epochs=2)  # made anew, as in a new process
        for step, _ in zip(plan.steps(packs_per_step, position), range(stop), strict=False):
            pieces.extend(int(sample) for pack in step.packs for sample in pack)
            position = Position(*json.loads(json.dumps(step.after)))
    assert plan_of(drawn(200), epochs=2).num_steps(3, position) == len(
        list(plan_of(drawn(200), epochs=2).steps(3, position))
    )
    assert pieces + shown(plan_of(drawn(200), epochs=2), packs_per_step=5, start=position) == whole


def test_more_epochs_go_on_where_fewer_ended() -> None:
    """Claim: every epoch ends in a step of its own, so that a run made longer shows every sample once in each."""
    samples = drawn(100)
    one, two = plan_of(samples), plan_of(samples, epochs=2)
    assert sum(one.packs_of_windows[0]) % 6 == 2, "a short last step is what this is about"
    steps = list(one.steps(6))
    more = list(two.steps(6, steps[-1].after))
    assert len(steps) + len(more) == two.num_steps(6) == len(list(two.steps(6)))
    seen = Counter(int(sample) for step in (*steps, *more) for pack in step.packs for sample in pack)
    assert seen == Counter(dict.fromkeys(range(100), 2))


def test_a_change_of_ranks_loses_and_repeats_nothing() -> None:
    """Claim: DP1, DP2, DP4, DP1, a quarter each: every sample once, and every rank has equally many packs a step."""
    samples = drawn(300)
    plan = plan_of(samples)
    seen: Counter[int] = Counter()
    position = START
    quarter = -(-plan.num_steps(6) // 4)
    for part, dp_size in enumerate((1, 2, 4, 1)):
        for number, step in enumerate(plan_of(samples).steps(6, position)):
            if number == quarter and part < 3:
                break
            shares = step.shares(samples, COST, dp_size=dp_size)
            assert len(shares) == dp_size and {len(share) for share in shares} == {-(-len(step.packs) // dp_size)}
            seen.update(int(sample) for share in shares for pack in share if pack is not None for sample in pack)
            position = step.after
    assert position == Position(1, 0, 0)
    assert seen == Counter(range(300))


def test_ranks_have_about_the_same_to_do() -> None:
    """Claim: by estimated cost, pictures included, within a tenth, where dealing in turn is further apart."""
    samples = drawn(3000)
    apart: list[float] = []
    for step in list(plan_of(samples).steps(32))[:-1]:
        sums = [
            sum(COST.of(samples, pack) for pack in share if pack is not None)
            for share in step.shares(samples, COST, dp_size=4)
        ]
        apart.append(max(sums) / (sum(sums) / 4) - 1.0)
    assert max(apart) < 0.1


def test_a_cost_counts_tokens_pairs_and_pictures_of_each_sample() -> None:
    samples = samples_of_lengths([10, 20], visual=[4, 0])
    assert Cost(1.0, 0.0, 0.0).of(samples, np.asarray([0, 1])) == 30.0
    assert Cost(0.0, 1.0, 0.0).of(samples, np.asarray([0, 1])) == 500.0
    assert Cost(0.0, 0.0, 1.0).of(samples, np.asarray([0, 1])) == 4.0


def test_without_packing_every_row_is_a_sample() -> None:
    plan = plan_of(drawn(100), budget=None)
    steps = list(plan.steps(8))
    assert len(steps) == plan.num_steps(8) == 13 and all(len(pack) == 1 for step in steps for pack in step.packs)
    assert sorted(shown(plan, packs_per_step=8)) == list(range(100))


def test_packs_come_in_no_order_of_their_fill() -> None:
    """Claim: best fit leaves its emptiest pack last, and a window's last pack to train on is as often another."""
    lengths = [100] * 320
    plan = plan_of(samples_of_lengths(lengths), budget=1000)  # 32 to a window: three full packs and one of two
    emptiest = [min(range(4), key=lambda number: len(plan.packs(0, window)[number])) for window in range(10)]
    assert len(set(emptiest)) > 1


def test_a_sample_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(DataError, match="takes 256 tokens, rounded up to a multiple of 64; at most 250"):
        plan_of(samples_of_lengths([10, 250]), budget=250, multiple=64)


def test_identities_differ_where_plans_do() -> None:
    samples = drawn(60)
    other_lengths = samples_of_lengths(samples.tokens + 1, samples.source)
    plans = [
        plan_of(samples),
        plan_of(samples, budget=300),
        plan_of(samples, multiple=2),
        plan_of(samples, seed=9),
        plan_of(samples, repeats={"b": 2.0}),
        plan_of(other_lengths, budget=300),
    ]
    identities = [json.dumps(plan.identity) for plan in plans]
    assert len(set(identities)) == len(plans)
    assert plan_of(drawn(60), epochs=4).identity == plans[0].identity  # a run may be made longer


def test_sources_are_seen_as_often_as_asked() -> None:
    """Claim: twice, one and a half times (once or twice each, all thrice in two epochs), half, and not at all."""
    samples = samples_of_lengths([8] * 40, [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10)
    mixture = Mixture(samples, {"a": 2.0, "b": 1.5, "c": 0.5, "d": 0.0}, seed=1)
    first, second = Counter(mixture.epoch(0).tolist()), Counter(mixture.epoch(1).tolist())
    both = first + second
    assert [both[sample] for sample in range(40)] == [4] * 10 + [3] * 10 + [1] * 10 + [0] * 10
    assert [first[sample] for sample in range(10)] == [2] * 10
    assert sorted(first[sample] for sample in range(10, 20)) == [1] * 5 + [2] * 5
    assert sum(first[sample] for sample in range(20, 30)) == 5


@settings(deadline=None)
@given(times=st.floats(0.0, 3.0), count=st.integers(1, 30), epochs=st.integers(1, 5))
def test_a_fraction_is_kept_over_epochs(times: float, count: int, epochs: int) -> None:
    """Claim: whatever the fraction, after any epochs no sample was seen more than once more often than another."""
    samples = samples_of_lengths([8] * (count + 1), [0] * count + [1])
    mixture = Mixture(samples, {"a": times}, seed=1)
    seen = Counter(sample for epoch in range(epochs) for sample in mixture.epoch(epoch).tolist() if sample < count)
    counts = [seen[sample] for sample in range(count)]
    assert max(counts) - min(counts) <= 1
    assert (
        sum(counts) == int(np.floor(float(times) * epochs * count + 1e-9))
        or abs(sum(counts) - times * epochs * count) <= 1.0
    )


def test_weights_set_shares_of_an_epoch_of_the_same_size() -> None:
    samples = samples_of_lengths([8] * 100, [0] * 80 + [1] * 20)
    repeats = repeats_by_weight(samples, {"a": 1.0, "b": 3.0})
    seen = Counter(int(samples.source[sample]) for sample in Mixture(samples, repeats, seed=0).epoch(0))
    assert seen == {0: 25, 1: 75}
    assert repeats_by_weight(samples, {"b": 2.0}) == {"a": 0.0, "b": 5.0}
    with pytest.raises(DataError, match="no sample has the source 'z'; there are a, b"):
        repeats_by_weight(samples, {"z": 1.0})


@pytest.mark.parametrize(
    ("repeats", "message"),
    [
        ({"z": 1.0}, "no sample has the source 'z'"),
        ({"a": -1.0}, "cannot be seen -1.0 times"),
        ({"a": float("nan")}, "cannot be seen nan times"),
        ({"a": 0.0}, "an epoch shows no sample"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(repeats: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Mixture(samples_of_lengths([8]), repeats, seed=0)


@pytest.mark.parametrize("budget", [8192, 1024])
def test_real_lengths_fill_packs(budget: int, shared_dir: Path) -> None:
    """Claim: at least 99 % full on the lengths of the four sets together, as they are and drawn again to a window.

    Rendered with the real tokenizer, without a system prompt. Blind spot: sets of one kind of record cannot be packed
    as well at 1,024, whoever packs: two of puzzlevqa's make 920 tokens.
    """
    render = ConversationRenderer(Renderer.from_folder(shared_dir / "qwen3_vl"), label_turns="last")
    lengths: list[int] = []
    for name in ("nlvr", "tabmwp", "puzzlevqa", "mathvision_testmini"):
        for record in read_records(shared_dir / "data" / name, purpose="evaluate"):
            written = record.caption and record.solution
            answer = response_text(record.caption or "", record.solution or "", record.answer)
            user = Turn("user", (Picture(record.image), record.question_text))
            turns = (user, Turn("assistant", (answer if written else record.answer,)))
            found = render.measure(Conversation(record.id, turns, record.source))
            if found.text_tokens + found.visual_tokens <= budget:
                lengths.append(found.text_tokens + found.visual_tokens)
    whole = np.random.default_rng(0).choice(lengths, planning.WINDOW)
    fills = [
        plan.fill(plan.packs(0, 0))
        for plan in (plan_of(samples_of_lengths(of), budget=budget) for of in (lengths, whole))
    ]
    print(f"{budget}: {fills}")
    assert min(fills) >= 0.99
