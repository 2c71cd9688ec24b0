"""The main job through its command line, on the shipped mini: artefacts, export, resume after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration

from model_providers.moe_discriminator.folder import read_variant
from prism_megatron.config.check import CheckConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import ToHFConfig
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.jobs.check_weights import check_weights
from prism_megatron.jobs.convert import Role, to_hf
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.testing import GlooWorld
from tests.integration.align_ranks import checkpoint_logprobs
from tests.waiting import wait_for

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_align.py"
SMALL = ("--prompts-per-step", "2", "--rollouts-per-prompt", "4", "--tokens-per-microbatch", "512", "--save-every", "2",
         "--temperature", "0.8")  # fmt: skip  # at 1, nobody would notice who left it out of the log-probs
STEPS = 4
EXAM = ("--eval-prompts", "4", "--eval-rollouts", "2", "--eval-every", "3")
# What must not depend on how often a run was interrupted, or on its layout.
LOSSES = ("discriminator_loss", "policy_loss", "discriminator_grad_norm", "policy_grad_norm", "response_tokens")


def command(output: Path, *flags: str) -> list[str]:
    return [sys.executable, str(TOOL), *SMALL, "--steps", str(STEPS), "--output", str(output), *flags]


def run(output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(output, *flags), capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run at TP2·PP2, with held-out prompts."""
    output = tmp_path_factory.mktemp("align") / "run"
    result = run(output, "--tp", "2", "--pp", "2", "--timings", *EXAM)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return output


def rows_of(output: Path) -> list[dict[str, Any]]:
    return read_metrics(output / "metrics.jsonl")


def assert_same_losses(rows: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]], *, relative: float) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for key in LOSSES:
            assert row[key] == pytest.approx(wanted[key], rel=relative, abs=relative), (row["step"], key)


def test_summary_has_what_users_read(finished: Path) -> None:
    """The promised keys, with counts beside shares."""
    summary = json.loads((finished / "summary.json").read_text())
    promised = (
        "steps policy_version world_size layout reward_gap disc_accuracy valid_share tokens_per_second "
        "seconds_by_phase hf_export checkpoint megatron_core torch"
    )
    assert set(promised.split()) <= set(summary)
    assert summary["steps"] == summary["policy_version"] == STEPS
    assert summary["world_size"] == 4
    assert summary["layout"] == {"tp": 2, "pp": 2, "cp": 1, "dp": 1, "ep": 1, "etp": 2}
    assert summary["totals"]["rollouts"] == STEPS * 2 * 4
    assert summary["totals"]["pairs"]["perception"] == summary["totals"]["valid_rollouts"] > 0


def test_the_time_to_the_first_row_is_told_by_phase(finished: Path) -> None:
    """Claim: once, from the command on, over its ranks; the parts add up."""
    lines = [line for line in (finished / "console.log").read_text().splitlines() if "to the first row: " in line]
    assert len(lines) == 1
    total, parts = re.fullmatch(r" *[\d.]+ s  ([\d.]+) s from the command to the first row: (.*)", lines[0]).groups()  # type: ignore[union-attr]
    seconds = {name: float(spent) for name, spent in (part.rsplit(" ", 1) for part in parts.split(", "))}
    assert list(seconds) == ["flags", "forecast", "ranks", "groups", "build", "restore", "prepare", "first step"]
    assert sum(seconds.values()) == pytest.approx(float(total), abs=0.05 * (len(seconds) + 1))
    assert seconds["ranks"] > 0 and seconds["first step"] > 0


def test_every_step_trains_both_players(finished: Path) -> None:
    """Pairs, finite non-zero gradient norms, and rollouts whose log-probs the trainer agrees with."""
    rows = rows_of(finished)
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert row["valid_rollouts"] > 0
        assert row["perception/pairs"] == row["reasoning/pairs"] == row["valid_rollouts"]
        assert 0 < row["policy_grad_norm"] < 1e3
        assert 0 < row["discriminator_grad_norm"] < 1e3
        assert row["logprob_gap"] < 1e-4, "the rollout replica and the trainer are not the same model"
        assert row["logprob_gap/image/tokens"] == row["response_tokens"], "every scene is an image"
        assert row["logprob_gap/text/tokens"] == 0
        assert row["logprob_gap/text/mean"] is row["logprob_gap/text/max"] is None
        assert row["logprob_gap/image/mean"] == row["logprob_gap"] <= row["logprob_gap/image/max"] < 1e-3
        assert 0 <= row["logprob_gap/image/kl"] < 1e-8


def test_report_is_one_page_with_three_samples(finished: Path) -> None:
    """Self-contained: three images inline, no address outside the page."""
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_held_out_prompts_are_asked_and_shown(finished: Path) -> None:
    """Claim: after the third step, at every checkpoint and at the end; how answers moved is in all three places."""
    rows, summary = rows_of(finished), json.loads((finished / "summary.json").read_text())
    assert [row.get("eval/prompts") for row in rows] == [None, 4, 4, 4]
    for name, found in summary["held_out"].items():
        assert found["after"][0] == pytest.approx(rows[-1][f"eval/{name}"], abs=1e-12)
        assert found["change"][0] == pytest.approx(found["after"][0] - found["before"][0], abs=1e-12)
    best = max(row["eval/sampled/accuracy"] for row in rows[1:])
    assert (
        summary["best_held_out_accuracy"] == best == rows[int(summary["best_held_out_step"])]["eval/sampled/accuracy"]
    )
    state = json.loads((finished / "checkpoints" / f"step_{STEPS:06d}" / "state.json").read_text())["state"]
    saved = {step + 1: rows[step]["eval/sampled/accuracy"] for step in (1, 3)}
    assert state["best_step"] == max(saved, key=lambda step: saved[step])
    page, console = (finished / "report.html").read_text(), (finished / "console.log").read_text()
    assert page.count("<figcaption>Held-out prompts") == 3 and page.count("<td>greedy/accuracy</td>") == 1
    assert console.count("4 held-out prompts after step ") == 3 and console.count("greedy/accuracy ") == 1


def test_export_loads_cleanly_and_has_moved(finished: Path) -> None:
    """transformers finds every tensor it wants and none it does not, and every part of the model has learnt."""
    _, info = Qwen3VLForConditionalGeneration.from_pretrained(finished / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    before = load_file(MINI_FOLDER / "policy" / "model.safetensors")
    after = load_file(finished / "hf" / "model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    parts = ["visual.blocks", "visual.merger", "visual.deepstack_merger_list", "embed_tokens"]
    parts += [f"language_model.layers.{layer}." for layer in range(4)]
    for part in parts:
        assert any(part in name for name in changed), f"nothing in {part} has changed"


def test_exported_policy_is_the_trained_one(finished: Path) -> None:
    """Log-probs of 32 held-out scenes: our engine on the checkpoint against transformers on the export, to 1e-4."""
    num_scenes = 32
    with GlooWorld(1) as gloo:
        (ours,) = gloo.run(checkpoint_logprobs, finished / "checkpoints" / f"step_{STEPS:06d}", num_scenes)
    model = Qwen3VLForConditionalGeneration.from_pretrained(finished / "hf", dtype=torch.float32).eval()
    renderer = Renderer.from_folder(finished / "hf")
    examples = SceneSource(renderer, split="heldout", seed=0, batch_size=num_scenes).batch(0)
    worst = 0.0
    for example, expected in zip(examples, ours, strict=True):
        row, mask = renderer.training_row(example.prompt, example.reference)
        ids = torch.tensor([row.token_ids])
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == renderer.image_token_id).int(),
                pixel_values=torch.from_numpy(row.images[0].pixel_values_P_D),
                image_grid_thw=torch.tensor([row.images[0].grid_thw]),
            ).logits
        picked = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        theirs = picked[torch.tensor(mask[1:]).bool()]
        worst = max(worst, float((theirs - torch.tensor(expected)).abs().max()))
    assert worst < 1e-4


def test_a_killed_run_goes_on_to_the_same_losses(finished: Path, tmp_path: Path) -> None:
    """SIGKILL after the first checkpoint; the same command with --load ends in the uninterrupted run's losses.

    Answers to held-out prompts are the same to the last bit, and none is asked for twice.
    """
    output = tmp_path / "run"
    kill_when(command(output, "--tp", "2", "--pp", "2", *EXAM), (output / "checkpoints" / "step_000002").exists)
    assert len(rows_of(output)) < STEPS
    result = run(output, "--tp", "2", "--pp", "2", "--load", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    rows, whole = rows_of(output), rows_of(finished)
    assert_same_losses(rows, whole, relative=1e-6)
    assert [{name: row[name] for name in row if name.startswith("eval/")} for row in rows] == [
        {name: row[name] for name in row if name.startswith("eval/")} for row in whole
    ]
    moved, wanted = (json.loads((one / "summary.json").read_text())["held_out"] for one in (output, finished))
    assert moved == wanted, "the first policy's answers, and what moved since"
    assert "asking 4 held-out prompts" not in result.stdout, "the first policy has answered"


@pytest.mark.long
def test_a_kill_inside_a_save_loses_nothing(finished: Path, tmp_path: Path) -> None:
    """SIGKILL while the second checkpoint is being written: the first one is what the run goes on from."""
    output = tmp_path / "run"
    checkpoints = output / "checkpoints"
    kill_when(command(output, "--tp", "2", "--pp", "2", *EXAM), lambda: any(checkpoints.glob(".step_000004*")))
    assert not (checkpoints / "step_000004").exists()
    result = run(output, "--tp", "2", "--pp", "2", "--load", str(output))
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(checkpoints.glob(".step_*")), "leftovers of the killed save must be gone"
    assert_same_losses(rows_of(output), rows_of(finished), relative=1e-6)


@pytest.mark.long
def test_a_checkpoint_goes_on_in_another_layout(finished: Path, tmp_path: Path) -> None:
    """Saved at TP2·PP2, continued at TP1·DP2: the same losses up to fp32 rounding in another order of summation."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:06d}")
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000002"]
    flags = ("--load", str(output), "--tp", "1", "--pp", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, *command(output, *flags)[1:]], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_losses(rows_of(output), rows_of(finished), relative=1e-4)


def test_the_checkpoint_alone_gives_the_exported_policy(finished: Path, tmp_path: Path) -> None:
    """Claim: a checkpoint of training needs no other folder: to-hf makes of it what the run exported, files included.

    Its discriminator becomes a folder too, of the kind of the one it started from.
    """
    checkpoint = finished / "checkpoints" / f"step_{STEPS:06d}"
    assert check_weights(CheckConfig(str(checkpoint), str(finished / "hf"))).equal
    sources: dict[Role, Path] = {"policy": finished / "hf", "discriminator": MINI_FOLDER / "discriminator"}
    for role, source in sources.items():
        to_hf(ToHFConfig(load=str(checkpoint), save=str(tmp_path / role), role=role), say=lambda _: None)
        names = {path.name for path in source.iterdir() if path.suffix != ".safetensors"}
        assert {path.name for path in (tmp_path / role).iterdir() if path.suffix != ".safetensors"} == names
        assert all((tmp_path / role / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert read_variant(tmp_path / "discriminator") == read_variant(MINI_FOLDER / "discriminator")


def test_a_run_starts_from_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    """Claim: with ``--model`` and ``--discriminator`` a checkpoint, a new run takes weights and files of both players.

    At learning rate 0 and in another layout it ends in the weights it began with.
    """
    start = str(finished / "checkpoints" / f"step_{STEPS:06d}")
    flags = ("--model", start, "--discriminator", start, "--max-response-tokens", "96", "--system-prompt", "None",
             "--pp", "2", "--dtype", "fp32")  # fmt: skip
    result = run(tmp_path / "run", *flags, "--policy.lr", "0", "--discriminator.lr", "0", "--steps", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    end = str(tmp_path / "run" / "checkpoints" / "step_000001")
    roles: tuple[Role, ...] = ("policy", "discriminator")
    for role in roles:
        to_hf(ToHFConfig(load=start, save=str(tmp_path / role), role=role), say=lambda _: None)
        assert check_weights(CheckConfig(end, str(tmp_path / role), role=role)).equal


def kill_when(arguments: Sequence[str], condition: Any, *, timeout_s: float = 300.0) -> None:
    """Start a command, SIGKILL it (and with it, its ranks) as soon as ``condition()`` holds."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + timeout_s
    try:
        while not condition():
            assert process.poll() is None, f"the run ended by itself with status {process.returncode}"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    # The kernel ends the ranks; they must be gone before the same folder is used again.
    wait_for(lambda: not _runs(process.pid))


def _runs(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
