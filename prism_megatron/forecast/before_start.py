"""What a command does with a forecast before it starts ranks: play it in a child, print it, refuse what cannot fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.engine.dry.counted import Counted
from prism_megatron.engine.host.memory import bytes_of_rank
from prism_megatron.engine.launch import has_gpu
from prism_megatron.errors import ConfigError
from prism_megatron.forecast.build import Planned
from prism_megatron.forecast.case_file import write_cases
from prism_megatron.forecast.plays import Case, provider_of
from prism_megatron.forecast.verdict import GIB, RankNeed, check_fits, neediest, room_of, table

_ASK_SMALLEST = (
    "import torch; print(min((torch.cuda.get_device_properties(i).total_memory"
    " for i in range(torch.cuda.device_count())), default=0))"
)


class CannotPlayError(ConfigError):
    """A step cannot be played, or the process that plays has failed: nothing is known of what the run needs."""


def foretell(planned: Planned, *, say: Callable[[str], None] = print) -> RecomputeConfig | None:
    """Play, print and judge. What the run recomputes, with --recompute auto settled; None where it is not to go on.

    Raises ConfigError where a device does not hold it, and where it cannot be played but has to be, for
    ``--forecast only`` or ``--recompute auto``; otherwise that is said, and the run begins.
    """
    settings, asked = planned.settings, planned.policy.recompute
    is_open = asked.recompute == "auto"
    device_gib = settings.device_gib or _smallest_device()
    if is_open and not device_gib:
        raise ConfigError(
            "--recompute auto is settled by what a device holds, and this host shows no GPU; give the size of one by "
            "--device-gib, or name --recompute none, selective or full"
        )
    plays = len(planned.roles) * len(planned.ranks())
    off = "for each setting of --recompute until one fits" if is_open else "--forecast off leaves it out"
    say(f"counting what a step needs ({plays} plays; {off})")
    try:
        recompute, needs = _settled(planned, device_gib, say) if is_open else (asked, needs_of(planned))
    except CannotPlayError as error:
        if is_open:
            raise ConfigError(f"--recompute auto: {error}, and name --recompute none, selective or full") from error
        if settings.forecast == "only":
            raise
        say(f"no forecast: {error}")
        return asked
    for line in (*_assumed(planned), *table(needs)):
        say(line)
    if device_gib:
        check_fits(
            needs,
            device_gib=device_gib,
            reserve_gib=settings.device_reserve_gib,
            recompute=recompute.recompute,
            rows_flag="--max-tokens" if planned.policy.play == "sft" else "--tokens-per-microbatch",
            anyway=f"{recompute.as_flags()} --forecast off" if is_open else "--forecast off",
        )
        say(f"this fits a device of {device_gib:g} GiB beside --device-reserve-gib {settings.device_reserve_gib:g}")
    return None if settings.forecast == "only" else recompute


def _settled(planned: Planned, device_gib: float, say: Callable[[str], None]) -> tuple[RecomputeConfig, list[RankNeed]]:
    """The first setting that fits, by arithmetic, with its needs; the last one where none does."""
    room = room_of(device_gib=device_gib, reserve_gib=planned.settings.device_reserve_gib)
    for recompute in planned.policy.recompute.by_arithmetic():
        needs = needs_of(planned.recomputing(recompute))
        need = neediest(needs)
        worst, size = need.at_worst()
        fits = size <= room
        say(
            f"{recompute.as_flags()}: rank {need.rank} needs {size / GIB:.2f} GiB in the step of the {worst}, which "
            f"{'fits' if fits else 'does not fit'}"
        )
        if fits:
            break
    return recompute, needs


def needs_of(planned: Planned) -> list[RankNeed]:
    """What the played ranks need. Raises CannotPlayError, naming role and rank, for a case that cannot be played."""
    places = [(rank, role) for rank in planned.ranks() for role in planned.roles]
    lines = played([replace(planned.roles[role], rank=rank) for rank, role in places])
    counted: dict[tuple[int, str], Counted] = {}
    for (rank, role), line in zip(places, lines, strict=True):
        if "error" in line:
            raise CannotPlayError(f"the {role} of rank {rank} could not be played: {line['error']}; use --forecast off")
        counted[rank, role] = Counted(**line["counted"])
    offloaded = [role for role, case in planned.roles.items() if case.optimizer.offload]
    whole = whole_policy(planned.policy) if planned.samples_here else 0
    return [
        RankNeed(
            rank,
            {role: counted[rank, role] for role in planned.roles},
            offloaded,
            whole + (counted[rank, "policy"].parameters if planned.has_reference else 0),
        )
        for rank in planned.ranks()
    ]


def played(cases: Sequence[Case]) -> list[Mapping[str, Any]]:
    """A line for each case, of a child process that sees no GPU. Raises CannotPlayError where the child fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.json"
        write_cases(file, cases)
        alone = {name: value for name, value in os.environ.items() if name not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "prism_megatron.forecast", str(file)],
            env={**alone, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CannotPlayError(f"a step could not be played: {last}; use --forecast off")
    return [json.loads(line) for line in child.stdout.splitlines()]


def whole_policy(case: Case) -> int:
    """Bytes of the policy that an embedded rollout engine has on a rank; its keys and values are gone in training."""
    return _whole(Case("sft", case.shape, ParallelConfig(), dtype=case.dtype))


@cache
def _whole(case: Case) -> int:
    held = bytes_of_rank(
        provider_of(case).weight_mappings(), case.parallel, world_size=1, dtype=case.dtype, is_frozen=lambda _name: True
    )
    return held.parameters


def _assumed(planned: Planned) -> list[str]:
    """What the counts stand for, and what is not in them."""
    lines = []
    for role, case in planned.roles.items():
        work = case.work
        image = (
            "no image" if work.image_grid is None else f"an image of {' x '.join(map(str, work.image_grid))} patches"
        )
        lines.append(
            f"{role}: rows of {image}, {work.text_tokens} tokens of text and {work.answer_tokens} of an answer, in "
            f"micro-batches of {work.tokens_per_microbatch} tokens"
        )
    return [
        *lines,
        "not counted: an allocator's rounding, NCCL, cuBLAS, Transformer Engine's own buffers, FP8, colocated servers,",
        "keys and values while answers are drawn; experts are taken to be chosen evenly",
    ]


def _smallest_device() -> float:
    """GiB of this host's smallest GPU, asked in another process, for it initialises CUDA. 0 where there is none."""
    if not has_gpu():
        return 0.0
    child = subprocess.run([sys.executable, "-c", _ASK_SMALLEST], capture_output=True, text=True, check=False)
    return int(child.stdout or 0) / GIB if child.returncode == 0 else 0.0
