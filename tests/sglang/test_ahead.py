"""Real servers that generate while the policy is updated: every token is drawn by the version that it is said to be of.

Oracle: transformers with the weights of each version, in fp32 on both sides. Tolerance 1e-4 nats. Blind to CUDA kernels
and to servers that hold several GPUs.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from prism_megatron.observability.metrics import read_metrics
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.sglang.arguments import PYTHON
from prism_megatron.types import Prompt, Rollout
from tests.sglang.conftest import REPOSITORY, World, steps_told, wait_until_sampling
from tests.sglang.test_real_server import TOLERANCE, hand_over, moved
from tests.unit.rollout.oracle import forced_logprobs

FIRST_VERSION, UPDATES, ATTEMPTS = 20, 5, 6
FLAGS = "--tp 2 --dtype fp32 --steps 4 --prompts-per-step 2 --rollouts-per-prompt 4 --rollout sglang --rollout-ahead 1"


@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
def test_unfinished_answers_go_on_under_the_new_weights(world: World, with_images: bool) -> None:
    """The keys and values of the old weights are gone: log-probs after an update are the new policy's.

    Whether an update finds an answer under way is the machine's to say, so it is tried until one did.
    """
    some_weights = [moved(seed) for seed in (21, 22, 23)]
    prompts = [prompt for prompt in world.prompts() if bool(prompt.images) is with_images] * 2
    sampling = Sampling(temperature=2.0, max_new_tokens=400)
    for attempt in range(ATTEMPTS):
        first = FIRST_VERSION + attempt * (UPDATES + 1)
        hand_over(world, some_weights[0], first)
        answers, last = answers_during_updates(world, prompts, sampling, some_weights, first=first)
        if any(len(rollout.versions) > 1 for _, rollout in answers):
            break
    else:
        pytest.fail(f"blind: no answer was under way in an update, {ATTEMPTS} times")
    for version in range(first, last + 1):
        world.load(some_weights[(version - first) % 3])
        for prompt, rollout in answers:
            of_version = torch.tensor(rollout.token_versions()) == version
            if of_version.any():
                expected = forced_logprobs(world.oracle, prompt, rollout, sampling.temperature)
                gap = (torch.tensor(rollout.logprobs).double() - expected).abs()[of_version]
                assert float(gap.max()) <= TOLERANCE, (prompt.id, rollout.versions)


def answers_during_updates(
    world: World, prompts: list[Prompt], sampling: Sampling, some_weights: list[dict[str, torch.Tensor]], *, first: int
) -> tuple[list[tuple[Prompt, Rollout]], int]:
    """Four answers to each prompt, weights being updated while they are drawn; and the last version."""
    collected: list[list[tuple[Rollout, ...]]] = []
    thread = threading.Thread(
        target=lambda: collected.append(world.engine.generate(SampleRequest(prompts, 4, sampling, seed=first, step=0)))
    )
    servers, last = world.servers.servers, first
    told = steps_told(servers)
    thread.start()
    wait_until_sampling(servers, told, thread, enough=any)
    while thread.is_alive() and last < first + UPDATES:
        last += 1
        world.engine.update_weights(iter(some_weights[(last - first) % 3].items()), last)
        wait_until_sampling(servers, steps_told(servers), thread, enough=any)
    thread.join()
    answers = [(prompt, rollout) for prompt, group in zip(prompts, *collected, strict=True) for rollout in group]
    assert len(answers) == 4 * len(prompts)
    return answers, last


def test_a_run_with_rollouts_ahead_reports_how_far_off_policy_it_is(tmp_path: Path) -> None:
    """Both ranks draw ahead. Log-probs of the policy that trains agree; those of older ones show in the weights."""
    output = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "run_align.py", *FLAGS.split(),
         "--rollout-python", REPOSITORY / PYTHON, "--output", output],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    first, *others = rows = read_metrics(output / "metrics.jsonl")
    assert [row["policy_version"] for row in rows] == [1, 2, 3, 4]
    assert first["staleness/max"] == first["off_policy_share"] == 0
    assert first["importance/mean"] == pytest.approx(1.0, abs=TOLERANCE)
    for row in others:
        assert row["sampled_version"] == row["step"] - row["staleness/max"] and row["staleness/max"] <= 1
        assert row["importance/mean"] == pytest.approx(1.0, abs=0.1)
    for row in rows:
        on_policy = row["logprob_gap/text/tokens"] + row["logprob_gap/image/tokens"]
        assert on_policy == pytest.approx((1.0 - row["off_policy_share"]) * row["response_tokens"], abs=1e-6)
        assert row["logprob_gap"] is None if on_policy == 0 else row["logprob_gap"] <= TOLERANCE
    stale = max(rows, key=lambda row: row["off_policy_share"])
    assert stale["off_policy_share"] > 0.5, "blind: hardly anything was drawn ahead"
    assert stale["importance/max"] > 1.0 + 10 * TOLERANCE > first["importance/max"]
    assert stale["importance/effective_share"] < first["importance/effective_share"] <= 1.0
