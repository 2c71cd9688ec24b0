"""What supervised fine-tuning costs beside TRL's SFTTrainer, beside a plain loop, and beside itself without packing.

    make bench-sft                                           both parts, on scenes (about half an hour)
    python benchmarks/sft.py speed --shared DIR              on DIR/data/puzzlevqa, in words of DIR/qwen3_vl
    python benchmarks/sft.py packing --shared DIR            on the lengths of all sets of DIR/data

``speed`` trains two small Qwen3-VLs of random weights, all parts, on eight records a step with an image of 128 x 128
pixels each: ours packed and padded, a plain transformers loop with plain and with fused AdamW, and TRL, which refuses
to pack records with images. All have the same weights, records, order, labels, rate (1e-4), AdamW without decay and
clipping at 1; that they read the same tokens is checked. Each has a process of one thread, decodes images as it goes,
and waits while others have their turns of a few steps. Of bf16 there are three kinds beside ours, which has fp32
masters: ``masters``, the same in a plain loop, whose losses must be ours; ``bf16``, in which AdamW itself rounds to
bf16; and ``autocast``, over weights and hidden states in fp32. The latter two come to other losses. TRL runs in an
environment of its own (``make trl``), with malloc set to keep what is freed, without which it is
slower. ``packing``, with the last of ``--models``: see ``sft_sides/packing.py``. Of the 31M model's work the vision
tower has about the share that it has of a 2B model's; of the tiny one's twice that, which no packing saves. Exit status
1 where a limit does not hold.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.sft_sides import packing, table
from benchmarks.sft_sides.drive import TRL_PYTHON, Side, SideError, take_turns
from benchmarks.sft_sides.material import SIZES, write_model, write_processing, write_records, write_varied_records
from benchmarks.sft_sides.order import write_order
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.data import STRUCTURED_SYSTEM_PROMPT
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.engine.runtime import start, stop

OURS = "ours, packed"
BESIDE_TRL = {"tiny": 1.5, "31M": 1.0}
BESIDE_PLAIN = {"tiny": 1.1, "31M": 1.0}
"""The larger one's time goes into matrix products, of which everyone makes the same."""
PACKS_A_STEP = {8192: 1, 1024: 8}
"""Rows of a step by their budget, so that steps have the same tokens."""
REAL_SETS = ("nlvr", "tabmwp", "puzzlevqa", "mathvision_testmini")


def sides_of(precision: str) -> tuple[list[Side], list[str], list[str], list[str]]:
    """All sides, and the names of plain ones, of TRL's, and of those whose losses must be ours."""
    more = () if precision == "fp32" else ("autocast", "masters")
    mine = [Side(f"ours, {way}", "sft_sides.ours_side", precision, way) for way in ("packed", "padded")]
    plain = [Side(f"plain, {precision}", "sft_sides.plain_side", precision, "plain")]
    plain += [Side(f"plain, {kind}, fused", "sft_sides.plain_side", kind, "fused") for kind in (precision, *more)]
    trl = [Side(f"TRL, {kind}", "sft_sides.trl_side", kind, "padded") for kind in (precision, *more[:1])]
    same = [side.name for side in (*mine, *plain, *trl) if side.is_ours or side.dtype in ("fp32", "masters")]
    return [*mine, *plain, *trl], [side.name for side in plain], [side.name for side in trl], same


def speed(arguments: argparse.Namespace, work: Path) -> bool:
    """Every model in every precision."""
    real = arguments.shared and arguments.shared / "data" / "puzzlevqa"
    write_records(work / "records", real)
    print(f"records: {'scenes' if real is None else real}; {platform.processor() or platform.machine()}, one thread")
    holds = True
    for model in arguments.models:
        write_processing(work / model, arguments.shared and arguments.shared / "qwen3_vl")
        count = write_model(work / model, SIZES[model])
        write_order(work, model, steps=arguments.steps)
        for precision in arguments.precisions:
            sides, plain, trl, same = sides_of(precision)
            taken = take_turns(sides, work, model, steps=arguments.steps, steps_in_turn=arguments.turn)
            if apart := table.differing(taken):
                raise SideError(apart)
            first = taken[OURS][0]
            print(
                f"\n{model}, {count / 1e6:.2f} M weights, {precision}, {arguments.steps} steps of 8 records, "
                f"{first.tokens} tokens and {first.labels} labels in the first"
            )
            limits = [table.Limit(tuple(trl), BESIDE_TRL[model]), table.Limit(tuple(plain), BESIDE_PLAIN[model])]
            text, held = table.lines(taken, ours=OURS, limits=limits, same_loss=same)
            print("\n".join(text), flush=True)
            holds &= held
    return holds


def pack(arguments: argparse.Namespace, work: Path) -> bool:
    """Both budgets, without a system prompt; with the long one rows are fewer records, and their fill is printed."""
    shared, size = arguments.shared, arguments.models[-1]
    model = work / "packing"
    write_processing(model, shared and shared / "qwen3_vl")
    write_model(model, SIZES[size])
    if shared is None:
        paths = [write_varied_records(work / "varied")]
    else:
        paths = [shared / "data" / name for name in REAL_SETS]
    folder = model if shared is None else shared / "qwen3_vl"
    world = start(ParallelConfig(), seed=1)
    holds = True
    for budget, packs in PACKS_A_STEP.items():
        for system in (None, STRUCTURED_SYSTEM_PROMPT):
            renderer = Renderer.from_folder(folder, system_prompt=system)
            render = ConversationRenderer(renderer, label_turns="last")
            plan = packing.planned(packing.indexed(paths, render, work / "index"), budget)
            said = "without a system prompt" if system is None else f"with one of {len(system)} characters"
            print(f"\n{size}, {budget} tokens a row, {said}: {packing.described(plan.samples)}", flush=True)
            if system is not None:
                print(f"  rows are {packing.fill(plan):.2%} full")
                continue
            found = packing.measure(
                plan, render, renderer, budget=budget, model=model, world=world, packs=packs, steps=arguments.turn
            )
            full, fast = found.fill >= packing.FILL_LIMIT, found.ratio >= packing.SPEED_LIMIT
            same = found.apart <= packing.LOSS_LIMIT
            print(
                f"  rows are {found.fill:.2%} full (limit {packing.FILL_LIMIT:.0%}): {_verdict(full)}\n"
                f"  a packed step takes {_seconds(found.packed)} s, padded ({packing.PADDED_ROWS} rows at a time, "
                f"{found.padding:.2f} tokens for each real one) {_seconds(found.padded)} s: {found.ratio:.2f} times as "
                f"fast (limit {packing.SPEED_LIMIT}): {_verdict(fast)}\n"
                f"  losses are within {found.apart:.1e} (limit {packing.LOSS_LIMIT:.0e}): {_verdict(same)}",
                flush=True,
            )
            holds &= full and fast and same
    stop(world)
    return holds


def _seconds(taken: list[float]) -> str:
    return "/".join(f"{seconds:.2f}" for seconds in sorted(taken))


def _verdict(held: bool) -> str:
    return "holds" if held else "DOES NOT HOLD"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["speed", "packing"], metavar="PART", help="speed, packing")
    parser.add_argument("--shared", type=Path, help="folder with data/ (real sets) and qwen3_vl/ (the tokenizer)")
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=20, help="of every side, the first three of which warm up")
    parser.add_argument("--turn", type=int, default=4, help="steps that a side takes before the next one's turn")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - {"speed", "packing"}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose speed or packing")
    if arguments.steps <= table.WARM_UP:
        parser.error(f"--steps {arguments.steps}: the first {table.WARM_UP} warm up; take more")
    if "speed" in arguments.parts and not TRL_PYTHON.exists():
        parser.error(f"{TRL_PYTHON} does not exist; run make trl")
    torch.set_num_threads(1)
    holds = True
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as folder:
        for part, work in (("speed", speed), ("packing", pack)):
            if part in arguments.parts:
                holds &= work(arguments, Path(folder))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
