"""The whole path against real servers: tokens, log-probs, weights, and servers that die.

Oracle: transformers with the same weights, in fp32 on both sides. Tolerance 1e-4 nats. Blind to CUDA kernels, to
several GPUs a server and to networks: the servers run SGLang's native torch code on this machine.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prism_megatron.conversion.announced_weights import AnnouncedWeights
from prism_megatron.conversion.hf.writer import write_hf_folder
from prism_megatron.errors import RolloutError, WeightSyncError
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.sglang.weights import Transport
from prism_megatron.types import Rollout
from tests.sglang.conftest import FOLDER, World, steps_told, wait_until_sampling
from tests.unit.rollout.weights import mini_weights
from tests.waiting import wait_for

TOLERANCE = 1e-4
VISION_MOVED = 0.05
RESTART_SECONDS = 400.0


def moved(seed: int) -> dict[str, Tensor]:
    """Weights after a step: all of them a little off, the vision tower's too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + VISION_MOVED * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1
        else tensor
        for name, tensor in mini_weights()
    }


def hand_over(world: World, weights: dict[str, Tensor], version: int) -> None:
    """As the engine's export does it: names and shapes first, tensors as they are needed."""
    world.load(weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    world.engine.update_weights(AnnouncedWeights(shapes, iter(weights.items())), version)


def held(world: World) -> list[tuple[str, str]]:
    """Version and checksum of each server, as it reports them."""
    clients = [server.client for server in world.servers.servers]
    return [
        (
            str(client.get("/model_info")["weight_version"]),
            str(client.post_again("/weights_checker", {"action": "checksum"})["per_engine_checksum"]),
        )
        for client in clients
    ]


def assert_close(world: World, version: int) -> None:
    """Every kind of prompt, sampled twice over so that both servers answer."""
    prompts = [*world.prompts(), *world.prompts()]
    groups = world.engine.generate(SampleRequest(prompts, 2, Sampling(max_new_tokens=24), seed=0, step=0))
    for prompt, group in zip(prompts, groups, strict=True):
        assert {rollout.policy_version for rollout in group} == {version}
        assert world.gap(prompt, group) <= TOLERANCE, prompt.id


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_those_of_transformers(world: World, temperature: float) -> None:
    hand_over(world, dict(mini_weights()), 1)
    prompts = world.prompts()
    groups = world.engine.generate(SampleRequest(prompts, 8, Sampling(temperature, max_new_tokens=40), seed=0, step=0))
    for prompt, group in zip(prompts, groups, strict=True):
        assert len(group) == 8
        assert world.gap(prompt, group, temperature or 1.0) <= TOLERANCE, prompt.id
        for rollout in group:
            watch = world.renderer.segment_finder.watch()
            goes_on = [watch.add(token) for token in rollout.token_ids]
            ended = rollout.token_ids[-1] == world.renderer.end_token_id or goes_on[-1]
            assert not any(goes_on[:-1]), "sampled on after the answer"
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert ended or len(rollout.token_ids) == 40


def test_greedy_tokens_are_those_of_the_embedded_engine(world: World) -> None:
    weights = dict(mini_weights())
    hand_over(world, weights, 1)
    embedded = EmbeddedRollout(
        FOLDER,
        world.renderer.segment_finder,
        end_token_ids=[world.renderer.end_token_id],
        device=torch.device("cpu"),
    )
    embedded.update_weights(iter(weights.items()), 1)
    greedy = Sampling(temperature=0.0, max_new_tokens=40)
    groups = [
        engine.generate(SampleRequest(world.prompts(), 1, greedy, seed=0, step=0))
        for engine in (world.engine, embedded)
    ]
    for (ours,), (theirs,) in zip(*groups, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.finish_reason, ours.segments) == (theirs.finish_reason, theirs.segments)


def test_responses_end_where_the_embedded_engine_ends_them(world: World) -> None:
    """A policy that never ends its turn, so that it goes on after ``</answer>``: same tokens, same reasons.

    Its row of the head for the end token is that of a token whose logit is always low. Greedy, so that both draw the
    same; sampled ones need only end by the rule.
    """
    weights = dict(mini_weights())
    end = world.renderer.end_token_id
    head = next(name for name in ("lm_head.weight", "model.language_model.embed_tokens.weight") if name in weights)
    weights[head] = weights[head].clone()
    weights[head][end] = 0.0
    hand_over(world, weights, 1)
    embedded = EmbeddedRollout(FOLDER, world.renderer.segment_finder, end_token_ids=[end], device=torch.device("cpu"))
    embedded.update_weights(iter(weights.items()), 1)
    prompts, greedy = world.prompts(), Sampling(temperature=0.0, max_new_tokens=160)
    groups = [engine.generate(SampleRequest(prompts, 1, greedy, seed=0, step=0)) for engine in (world.engine, embedded)]
    for (ours,), (theirs,) in zip(*groups, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
    assert any(ours.finish_reason == "stop" for (ours,) in groups[0]), "blind: none went on after its answer"
    sampled = world.engine.generate(SampleRequest(prompts, 16, Sampling(max_new_tokens=160), seed=0, step=0))
    stopped = [r for group in sampled for r in group if r.finish_reason == "stop" and r.token_ids[-1] != end]
    assert stopped, "blind: none went on after its answer"
    for rollout in stopped:
        watch = world.renderer.segment_finder.watch()
        assert [watch.add(token) for token in rollout.token_ids] == [False] * (len(rollout.token_ids) - 1) + [True]


@contextmanager
def sharing(world: World, transport: Transport) -> Iterator[SGLangRollout]:
    """Another engine in the place of the world's, on the same servers, which come back to it when they die."""
    engine = world.engine
    shared = SGLangRollout(
        FOLDER,
        world.renderer.segment_finder,
        urls=world.servers.urls,
        api_key=world.servers.api_key,
        end_token_ids=[world.renderer.end_token_id],
        spool=world.folder / transport,
        servers=world.servers,
        options=SGLangOptions(transport=transport, bucket_bytes=400_000),
    )
    world.engine = shared
    try:
        yield shared
    finally:
        world.engine = engine
        world.servers.on_restart(engine._weights.restore)
        shared._servers = None  # they are not its own to stop
        shared.close()


@pytest.mark.parametrize("transport", ["tensor", "disk", "group"])
def test_an_update_reaches_every_weight_and_no_cache_survives_it(world: World, transport: Transport) -> None:
    """The same images before and after: keys, values and image features of the old weights must be gone."""
    with sharing(world, transport):
        for version, weights in ((1, dict(mini_weights())), (2, moved(2)), (3, dict(mini_weights()))):
            hand_over(world, weights, version)
            assert_close(world, version)
            first, second = held(world)
            assert first == second and first[0] == str(version)


def test_both_transports_leave_the_same_weights(world: World) -> None:
    """And another step leaves others: the checksum sees a difference."""
    weights = moved(5)
    hand_over(world, weights, 1)
    by_tensor = held(world)[0][1]
    folder = world.folder / "by disk"
    write_hf_folder(folder, iter(weights.items()), like=FOLDER)
    client = world.servers.servers[0].client
    client.post("/update_weights_from_disk", {"model_path": str(folder), "weight_version": "1"})
    assert held(world)[0][1] == by_tensor
    hand_over(world, moved(6), 2)
    assert held(world)[0][1] != by_tensor


def test_wrong_names_change_nothing(world: World) -> None:
    """SGLang itself would take the first in silence and die of the second."""
    hand_over(world, dict(mini_weights()), 7)
    before = held(world)
    name = "model.visual.blocks.0.mlp.linear_fc1.weight"
    for wrong in ({"model.visual.block.0": torch.zeros(3)}, {name: torch.zeros(5, 5)}):
        with pytest.raises(WeightSyncError, match=re.escape(next(iter(wrong)))):
            world.engine.update_weights(iter((dict(mini_weights(2.0)) | wrong).items()), 8)
    dropped = {key: value for key, value in mini_weights(2.0) if key != name}
    with pytest.raises(WeightSyncError, match=f"not sent: {name}"):
        world.engine.update_weights(iter(dropped.items()), 8)
    assert held(world) == before and world.engine.policy_version == 7
    assert_close(world, 7)


def test_when_one_server_cannot_begin_both_keep_the_version(world: World) -> None:
    hand_over(world, dict(mini_weights()), 7)
    before = held(world)
    world.servers.servers[1].client.post("/begin_weight_update", {})
    with pytest.raises(WeightSyncError, match="already open"):
        world.engine.update_weights(iter(moved(3).items()), 8)
    assert held(world) == before
    assert_close(world, 7)
    world.servers.servers[1].client.post("/end_weight_update", {})
    hand_over(world, moved(3), 8)
    assert_close(world, 8)


def test_a_wrong_key_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="refuses the API key"):
        SGLangRollout(
            FOLDER,
            world.renderer.segment_finder,
            urls=world.servers.urls,
            api_key="not the key",
            end_token_ids=[world.renderer.end_token_id],
            spool=tmp_path,
        )


def wait_until_restored(world: World, url: str, version: int) -> None:
    """Until the server at ``url`` answers and holds ``version``."""
    client = ServerClient(url, api_key=world.servers.api_key)

    def holds() -> bool:
        try:
            return bool(client.get("/model_info", seconds=1.0)["weight_version"] == str(version))
        except RolloutError:
            return False

    wait_for(holds, seconds=RESTART_SECONDS, poll_seconds=0.5)
    client.close()


def test_a_server_killed_while_it_samples_costs_no_answer(world: World) -> None:
    """It comes back with the policy's weights, not its folder's."""
    hand_over(world, moved(4), 11)
    prompts = [world.renderer.prompt(f"p{i}", f"How many? {i}", []) for i in range(24)]
    collected: list[list[tuple[Rollout, ...]]] = []

    def generate() -> None:
        sampling = Sampling(temperature=2.0, max_new_tokens=200)
        collected.append(world.engine.generate(SampleRequest(prompts, 4, sampling, seed=0, step=0)))

    thread = threading.Thread(target=generate)
    victim = world.servers.servers[0]
    told = steps_told([victim])
    thread.start()
    wait_until_sampling([victim], told, thread)
    assert thread.is_alive(), "blind: nothing was being sampled"
    victim.kill()
    thread.join()
    (groups,) = collected
    assert [len(group) for group in groups] == [4] * len(prompts)
    for prompt, group in zip(prompts, groups, strict=True):
        assert {rollout.policy_version for rollout in group} == {11}
        assert world.gap(prompt, group, 2.0) <= TOLERANCE
    wait_until_restored(world, victim.url, 11)
    first, second = held(world)
    assert first == second
    assert_close(world, 11)


def test_a_server_killed_in_an_update_comes_back_with_the_new_weights(world: World) -> None:
    """Weights are on their way from the trainer while it dies; the other server goes on.

    Blind to workers of several GPUs, and to NCCL.
    """
    hand_over(world, moved(4), 11)
    victim = world.servers.servers[1]
    weights = moved(9)
    world.load(weights)

    def deadly() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(weights.items()):
            if number == len(weights) // 2:
                victim.kill()
            yield item

    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with sharing(world, "group") as engine:
        engine.update_weights(AnnouncedWeights(shapes, deadly()), 12)
        assert_close(world, 12)
        wait_until_restored(world, victim.url, 12)
        first, second = held(world)
        assert first == second
        hand_over(world, moved(10), 13)
        assert_close(world, 13)
        first, second = held(world)
        assert first == second
