"""What a GPU has to hold of a 4B run on eight of them, by stage and flags: the table of docs/running.md.

    make bench-memory-plan                          all rows (15 minutes of a CPU)
    make bench-memory-plan ARGS="align --tp 4 --pp 2"   one row of your own: a stage and its flags

The policy has the sizes of Qwen/Qwen3-VL-4B-Instruct; the discriminator of an alignment is made of a model of those of
Qwen/Qwen3-VL-2B-Instruct, with two towers of four experts. Everything else is the stages' defaults, which are the
paper's: rows of 8,192 tokens; prompts of 2,048 tokens with answers of 6,144 (alignment) or 8,192 (reinforcement),
micro-batches of 16,384. Commands play the same steps before they start ranks (docs/device_pass.md); nothing is
downloaded, and no rank is started. A row says what the rank that needs most holds, in GiB, and whether that leaves
``RESERVE`` of ``DEVICE``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.cli import parse_over
from prism_megatron.config.presets import preset
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.config.stages.sft import SFTConfig
from prism_megatron.forecast.before_start import needs_of
from prism_megatron.forecast.build import Planned, plan_align, plan_rlvr, plan_sft
from prism_megatron.forecast.verdict import GIB, held

WORLD_SIZE = 8
DEVICE = 79
"""GiB that CUDA tells of a card of 80 GB."""
RESERVE = 4
ROWS = (
    "sft",
    "sft --tp 4 --pp 2",
    "rlvr",
    "rlvr --recompute full",
    "rlvr --tp 4 --pp 2",
    "align",
    "align --recompute full",
    "align --recompute full --discriminator.offload --policy.offload",
    "align --tp 2 --ep 4 --recompute full",
    "align --tp 4 --pp 2",
    "align --tp 4 --pp 2 --recompute full",
)
HEAD = (
    "| command | at most | in the step of the | held, policy | held, discriminator | peak, policy "
    "| peak, discriminator | fits |\n|---|---|---|---|---|---|---|---|"
)


def plan(row: str) -> Planned:
    """The run that ``prism-`` and this line start on eight ranks, its files and model aside."""
    stage, *flags = row.split()
    policy = preset("4B")
    if stage == "sft":
        return plan_sft(parse_over(SFTConfig(), flags, description=""), policy, world_size=WORLD_SIZE)
    if stage == "rlvr":
        return plan_rlvr(parse_over(RLVRConfig(), flags, description=""), policy, world_size=WORLD_SIZE)
    config = parse_over(AlignConfig(), flags, description="")
    return plan_align(config, policy, preset("2B"), world_size=WORLD_SIZE)


def line(row: str) -> str:
    """The row's figures, as they stand in the table."""
    need = max(needs_of(plan(row)), key=lambda one: one.at_worst()[1])
    worst, size = need.at_worst()
    roles = [need.roles.get(name) for name in ("policy", "discriminator")]
    cells = [
        *("–" if role is None else f"{held(role) / GIB:.1f}" for role in roles),
        *("–" if role is None else f"{max(role.pass_peak, role.step_peak) / GIB:.1f}" for role in roles),
    ]
    fits = "yes" if size <= (DEVICE - RESERVE) * GIB else "no"
    return f"| `prism-{row}` | {size / GIB:.1f} | {worst} | {' | '.join(cells)} | {fits} |"


def main() -> None:
    """Print the table, row by row, or the one that is asked for."""
    print(HEAD, flush=True)
    for row in [" ".join(sys.argv[1:])] if len(sys.argv) > 1 else ROWS:
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
