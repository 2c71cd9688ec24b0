"""One set of servers for several ranks: the main rank hands weights over, all ranks sample, and none is left waiting.

The servers are fakes in the test's process; the ranks, their collectives and their HTTP are real.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from prism_megatron.commands.align import parse
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.tools.convert import ToMegatronConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError, WeightSyncError
from prism_megatron.jobs.convert import to_megatron
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.sglang.engine import SGLangRollout
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.sampling.probe import ServingProbe
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.sampling.servers import API_KEY, build_served_rollout
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.testing import GlooWorld
from prism_megatron.training.roles import batch_format, build_policy
from prism_megatron.types import Prompt, Response, Rollout, Segments, VersionSpan
from tests.block_fp8 import write_block_fp8
from tests.mini_experts import write_mini_with_experts
from tests.unit.rollout.fake_sglang import CONTEXT, FOLDER, KEY, FakeSGLang, running
from tests.unit.rollout.oracle import forced_logprobs
from tests.unit.rollout.tiny_qwen import NoSegments
from tests.unit.rollout.weights import mini_weights
from tests.waiting import wait_for

RANKS = 2
LONG = 77
"""Token of the prompts whose answers take until the second version."""
PROBE_BOUND = 1e-4
"""In nats a token: what fp32 on both sides keeps to."""


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(image_token_id=498)) for _ in range(2)]


def gathered(misnamed: str | None) -> Iterator[tuple[str, Tensor]]:
    """An export: every tensor takes a collective of all ranks."""
    for name, tensor in mini_weights(2.0):
        dist.all_reduce(torch.zeros(1))
        yield name if name != misnamed else "a.wrong.name", tensor


def two_updates(world: World, urls: Sequence[str], spool: str) -> tuple[str, int | None, int, list[int]]:
    """A good update, one that the main rank refuses early, and sampling after it."""
    engine = SGLangRollout(
        FOLDER, NoSegments(), urls=urls, api_key=KEY, end_token_ids=[488], spool=Path(spool) / str(world.rank)
    )
    shared = SharedRollout(engine, world)
    shared.update_weights(gathered(None), 1)
    message = ""
    try:
        shared.update_weights(gathered(next(mini_weights())[0]), 2)
    except WeightSyncError as error:
        message = str(error)
    groups = shared.generate(
        SampleRequest([Prompt(str(world.rank), (5, 6), (), "")], 3, Sampling(max_new_tokens=4), seed=0, step=0)
    )
    version = shared.policy_version
    shared.close()
    return message, version, len(groups[0]), [rollout.policy_version for rollout in groups[0]]


def prompts_ahead(step: int) -> list[Example]:
    """One prompt a rank: short answers, answers that wait for an update, and a prompt of rank 1's that is too long."""
    steps: list[list[tuple[int, ...]]] = [[(5, 6), (7, 6)], [(LONG, 6), (LONG, 7)], [(5, 6), (5,) * CONTEXT]]
    reference = Response((6,), Segments(None, None, "not judged"))
    return [Example(Prompt(f"{step}-{i}", ids, (), ""), reference) for i, ids in enumerate(steps[step])]


def three_steps_ahead(
    world: World, urls: Sequence[str], spool: str
) -> tuple[list[list[tuple[VersionSpan, ...]]], tuple[int, int], str]:
    """Versions of two steps' answers, the second drawn while the first one "trained", and what the third one says."""
    engine = SGLangRollout(
        FOLDER, NoSegments(), urls=urls, api_key=KEY, end_token_ids=[488], spool=Path(spool) / str(world.rank)
    )
    shared = SharedRollout(engine, world)
    shared.update_weights(gathered(None), 1)
    queue = RolloutQueue(
        shared, prompts_ahead, Sampling(max_new_tokens=4), n=1, seed=0, world=world, steps=range(3), ahead=1
    )
    first = queue.take(0)
    clients = [ServerClient(url, api_key=KEY) for url in urls]
    wait_for(lambda: sum(client.get("/server_info")["running"] for client in clients) >= RANKS)
    dist.barrier()
    shared.update_weights(gathered(None), 2)
    second = queue.take(1)
    message = ""
    try:
        queue.take(2)
    except PrismError as error:
        message = str(error)
    queue.close()
    versions = [[group.rollouts[0].versions for group in taken.groups] for taken in (first, second)]
    return versions, (second.version, second.staleness.max_updates), message


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(RANKS, timeout_s=120.0) as gloo:
        yield gloo


def test_ranks_agree_on_what_the_servers_hold(gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path) -> None:
    for rank in range(RANKS):
        (tmp_path / str(rank)).mkdir()
    for message, version, count, versions in gloo.run(two_updates, [fake.url for fake in fakes], str(tmp_path)):
        assert "no weight 'a.wrong.name'" in message
        assert version == 1 and count == 3 and versions == [1, 1, 1]
    for fake in fakes:
        assert fake.paths().count("/begin_weight_update") == 1, "only the main rank hands weights over"
        assert fake.version == "1"


def test_ranks_draw_ahead_while_weights_are_handed_over(
    gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Answers that an update overtakes are used by all ranks and drawn once, also before a rank hears that it is over.

    An error that one rank meets in the background reaches all in the step that needs the rollouts, word for word.
    """
    for rank in range(RANKS):
        (tmp_path / str(rank)).mkdir()
    for fake in fakes:
        fake.held = (LONG, "2")
    for versions, staleness, message in gloo.run(three_steps_ahead, [fake.url for fake in fakes], str(tmp_path)):
        assert versions == [
            [(VersionSpan(1, 0, 3),)] * 2,
            [(VersionSpan(1, 0, 1), VersionSpan(2, 1, 3))] * 2,
        ]
        assert staleness == (2, 1)
        assert message.startswith(f"prompt '2-1' has {CONTEXT} tokens; with 4 new ones it exceeds")
    assert sum(fake.paths().count("/generate") for fake in fakes) == 5


def serve(world: World, source: Path, urls: Sequence[str], output: Path) -> tuple[list[str], int]:
    """Names in the folder that is made of ``source`` for servers, and the version after the first hand-over."""
    os.environ[API_KEY] = KEY
    companions = files_folder(source, "policy")
    shape = Qwen3VLShape.from_folder(companions)
    policy = build_policy(
        source,
        shape,
        world=world,
        dtype=torch.float32,
        optimizer=OptimizerConfig(),
        total_steps=1,
    )
    config = parse(["--rollout", "sglang", "--rollout-urls", *urls, "--output", str(output)])
    renderer = Renderer.from_folder(companions)
    shared = build_served_rollout(config.rollout, config.data, source, shape, renderer, output=output, world=world,
                                  dtype=torch.float32)  # fmt: skip
    names = HFFolder(output / "rollout" / "model").names()
    shared.update_weights(policy.export_hf(layout=shared.expert_layout), 4)
    version = shared.policy_version
    shared.close()
    shared.close()  # as the queue of a run that ends early does, and then the run
    assert version is not None
    return list(names), version


def test_a_checkpoint_is_served_as_a_folder_of_its_policy(
    gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Oracle: the folder that the checkpoint was converted from. The folder goes when the run ends.

    The run goes on with one that was killed, which left weights behind: they are in nobody's way, and go too.
    """
    checkpoint = tmp_path / "checkpoint"
    to_megatron(ToMegatronConfig(hf=str(FOLDER), save=str(checkpoint)), say=lambda _: None)
    killed = tmp_path / "run" / "rollout" / "weights-0"
    killed.mkdir(parents=True)
    (killed / "weights-00001.safetensors").touch()
    urls = [fake.url for fake in fakes]
    for names, version in gloo.run(serve, checkpoint, urls, tmp_path / "run", parallel=ParallelConfig(tp=2)):
        assert set(names) == {name for name, _ in mini_weights()} and version == 4
    for fake in fakes:
        assert fake.version == "4" and all(torch.equal(fake.weights[name], tensor) for name, tensor in mini_weights())
    assert not list((tmp_path / "run" / "rollout").iterdir())


def test_an_fp8_folder_is_served_as_the_policy_holds_it(
    gloo: GlooWorld, fakes: list[FakeSGLang], tmp_path: Path
) -> None:
    """Claim: servers get the names and numbers that the policy was loaded with, none of them quantised."""
    source = tmp_path / "policy"
    shutil.copytree(FOLDER, source)
    write_block_fp8(source, dict(mini_weights()), json.loads((FOLDER / "config.json").read_text()))
    expected = open_weights(source)
    urls = [fake.url for fake in fakes]
    for names, _ in gloo.run(serve, source, urls, tmp_path / "run", parallel=ParallelConfig(tp=2)):
        assert set(names) == set(expected.names()) == {name for name, _ in mini_weights()}
    assert all(torch.equal(fakes[0].weights[name], expected.get(name).float()) for name in expected.names())


def test_experts_reach_servers_one_by_one(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: of a folder that SGLang would misread servers are given one that it reads; a hand-over from two
    expert-parallel ranks brings them, bit for bit, what that folder holds. Blind to real servers."""
    source = write_mini_with_experts(tmp_path / "policy", "transformers")
    expected = load_file(write_mini_with_experts(tmp_path / "served", "per_expert") / "model.safetensors")
    with running(image_token_id=498, folder=tmp_path / "served") as fake:
        fake.weights = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        layout = ParallelConfig(ep=2)
        for names, version in gloo.run(serve, source, [fake.url], tmp_path / "run", parallel=layout):
            assert set(names) == expected.keys() and version == 4
        assert fake.loaded == expected.keys()
        assert all(torch.equal(fake.weights[name], tensor) for name, tensor in expected.items())


class Scores:
    """Servers that score the probe as they are told to."""

    def __init__(self, scores: dict[str, tuple[float, ...]]) -> None:
        self.scores = scores
        self.num_asked = 0
        self.took_back = 0

    def score(self, _prompt: Prompt, response: Sequence[int]) -> dict[str, tuple[float, ...]]:
        self.num_asked += 1
        return {url: logprobs[: len(response)] for url, logprobs in self.scores.items()}


def probe_policy(world: World) -> tuple[list[int], str]:
    """Of versions 0, 3, 6, 9 and 12, those at which a probe every 5 asked; what it says of a server that is off."""
    shape, renderer = Qwen3VLShape.from_folder(FOLDER), Renderer.from_folder(FOLDER)
    policy = build_policy(FOLDER, shape, world=world, dtype=torch.float32, optimizer=OptimizerConfig(), total_steps=1)
    examples = SceneSource(renderer, split="align", seed=0, batch_size=8).batch(0)
    shown = next(example for example in examples if example.prompt.images)
    ids = shown.reference.token_ids
    answer = Rollout(ids, (0.0,) * len(ids), "stop", (VersionSpan(0, 0, len(ids)),), shown.reference.segments)
    oracle = Qwen3VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    right = tuple(forced_logprobs(oracle, shown.prompt, answer, 1.0).tolist())
    probe = ServingProbe(
        examples,
        every=5,
        bound=PROBE_BOUND,
        form=batch_format(renderer, world),
        world=world,
    )
    servers, asked = Scores({"http://a": right, "http://b": right}), []
    for version in (0, 3, 6, 9, 12):
        before = servers.num_asked
        probe.check(servers, policy, version)
        asked += [version] * (servers.num_asked - before)
    servers.scores["http://b"] = tuple(logprob - 2 * PROBE_BOUND for logprob in right)
    message = ""
    try:
        probe.check(servers, policy, 20)
    except WeightSyncError as error:
        message = str(error)
    return asked, message


def test_the_probe_finds_a_server_that_scores_otherwise_than_the_trainer(gloo: GlooWorld) -> None:
    """On two pipeline stages, with an image. Oracle of right scores: transformers. Blind to real servers."""
    for asked, message in gloo.run(probe_policy, parallel=ParallelConfig(pp=2)):
        assert asked == [0, 6, 12]
        assert message.startswith("http://b gives the probe") and "differ by 0.0002 a token" in message
