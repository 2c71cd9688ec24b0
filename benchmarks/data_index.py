"""What an index of a large set costs, and what a rank then needs to read it: time, memory, records a second.

    python benchmarks/data_index.py                          1.37 million records, 200,000 of them read
    python benchmarks/data_index.py --records 20000 --read 5000

One run writes synthetic conversations (lognormal lengths; every record names one of 64 small images) into a temporary
folder, builds their index with ``--workers`` processes, then starts a fresh process as a rank would start and reports:
seconds until its plan is known, anonymous memory (Anonymous of /proc/self/smaps_rollup; Linux only) as it goes through
records, and records a CPU second with images decoded and without. The tokenizer is the mini's unless ``--model`` names
a folder with another.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from prism_megatron.data.formats.conversations import ConversationLines
from prism_megatron.data.index.index import Index, open_index
from prism_megatron.data.index.samples import IndexedCorpus, samples_of
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.stream.mixture import Mixture
from prism_megatron.data.stream.plan import START, Cost, Packing, Plan
from prism_megatron.data.stream.prefetch import Loader
from prism_megatron.data.tokenizer import save_mini_processing
from prism_megatron.observability.activity import Activity, Heartbeat

NUM_IMAGES = 64
LINE = (
    '{{"id": "{}", "source": "s{}", "turns": [{{"role": "user", "parts": [{{"image": "images/{}.png"}}, '
    '{{"text": "How many shapes are there?"}}]}}, {{"role": "assistant", "parts": "{}"}}]}}\n'
)
BUDGET = 8192
PACKS_PER_STEP = 8
MEMORY_LIMIT_MB = 400
START_LIMIT_SECONDS = 20
WORDS = ("the", "circle", "and", "square", "red", "blue", "count", "two", "three", "left", "above", "shape", "is")


def write_records(folder: Path, count: int, *, median_words: float) -> Path:
    """Conversations about small images, with answers of lognormal length."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(NUM_IMAGES):
        size = (32 * (1 + number % 2), 32)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
            folder / "images" / f"{number}.png"
        )
    pool = " ".join(rng.choice(WORDS, 200_000)).encode()
    lengths = np.clip(rng.lognormal(np.log(median_words * 6), 0.7, count), 20, 40_000).astype(int)
    starts = rng.integers(0, len(pool) - 40_001, count)
    path = folder / "data.jsonl"
    with path.open("wb") as file:
        for number, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            answer = pool[start : start + length].strip().decode() or "two"
            file.write(LINE.format(number, number % 5, number % NUM_IMAGES, answer).encode())
    return path


def anonymous_mb() -> float:
    """Anonymous memory of this process, in MB."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:")) / 1e3


def as_a_rank(path: Path, model: Path, index: Path, *, read: int, workers: int) -> bool:
    """Start, plan, and go through records: what a fresh process of this file does with ``--rank-of``.

    Returns whether it kept to the limits.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    bare = anonymous_mb()
    renderer = Renderer.from_folder(model)
    render = ConversationRenderer(renderer, label_turns="last")
    corpus = ConversationLines(path)
    samples = samples_of([IndexedCorpus(corpus, Index(index))], part="train", max_tokens=BUDGET)
    plan = Plan(samples, Mixture(samples, {}, seed=0), packing=Packing(BUDGET, 1), seed=0, epochs=1)
    opened = time.perf_counter() - began
    steps = plan.num_steps(PACKS_PER_STEP)
    packs = plan.num_packs
    fill = int(samples.tokens.sum()) / (packs * BUDGET)
    started = time.perf_counter() - began
    cpu = time.process_time() - began_cpu
    print(f"start-up: {started:.1f} s, of which the plan took {started - opened:.1f}; {cpu:.1f} s of one core")
    print(f"plan: {len(samples)} samples, {packs} packs {100 * fill:.2f} % full, {steps} steps")
    print(f"anonymous memory: {bare:.0f} MB after imports, {anonymous_mb():.0f} MB with the plan")

    cpu, count = time.process_time(), 0
    for row in range(0, len(samples), max(1, len(samples) // 3000)):
        render.measure(samples.sets[0].index.read(corpus, int(samples.row[row])))
        count += 1
    print(f"without decoding: {count / (time.process_time() - cpu):.0f} records a CPU second")

    def loader(workers: int) -> Loader:
        return Loader(
            plan,
            render,
            cost=Cost(1.0, 0.0, 0.0),
            packs_per_step=PACKS_PER_STEP,
            dp_rank=0,
            dp_size=1,
            workers=workers,
            ahead=2,
            on_bad="fail",
            filler_id=renderer.pad_token_id,
        )

    cpu, count = time.process_time(), 0
    for step in loader(0).steps(START):
        count += sum(len(pack.samples) for pack in step.packs)
        if count >= 3000:
            break
    print(f"with decoding: {count / (time.process_time() - cpu):.0f} records a CPU second")

    began, count, shown, memory = time.perf_counter(), 0, 0, [anonymous_mb()]
    for step in loader(workers).steps(START):
        count += sum(len(pack.samples) for pack in step.packs)
        if count >= shown:
            memory.append(anonymous_mb())
            print(f"anonymous memory after {count:7d} records: {memory[-1]:.0f} MB", flush=True)
            shown += read // 8
        if count >= read:
            break
    print(f"read ahead by {workers} processes: {count / (time.perf_counter() - began):.0f} records a second")
    kept = started <= START_LIMIT_SECONDS and max(memory) <= MEMORY_LIMIT_MB
    print(f"limits are {'kept' if kept else 'NOT kept'}: {started:.1f} s to start, {max(memory):.0f} MB at most")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_370_000, help="records to write")
    parser.add_argument("--read", type=int, default=200_000, help="records to go through")
    parser.add_argument("--workers", type=int, default=2, help="processes that index, and that read ahead")
    parser.add_argument("--median-words", type=float, default=40.0, help="median length of an answer")
    parser.add_argument("--model", type=Path, default=None, help="folder with the tokenizer; default: the mini's")
    parser.add_argument("--rank-of", type=Path, nargs=3, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of is not None:
        sys.exit(0 if as_a_rank(*args.rank_of, read=args.read, workers=args.workers) else 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or folder / "mini"
        if args.model is None:
            save_mini_processing(model)
        began = time.perf_counter()
        path = write_records(folder, args.records, median_words=args.median_words)
        size = path.stat().st_size
        print(f"wrote {args.records} records, {size / 1e6:.0f} MB, in {time.perf_counter() - began:.0f} s", flush=True)

        activity = Activity()
        heartbeat = Heartbeat(
            activity, say=lambda line: print(line, flush=True), seconds_silent=lambda: 60.0, poll_seconds=30.0
        )
        began = time.perf_counter()
        with activity.phase("indexing"):
            index = open_index(
                ConversationLines(path),
                ConversationRenderer(Renderer.from_folder(model), label_turns="last"),
                folder / "indexes",
                validation_share=0.0,
                on_bad="fail",
                workers=args.workers,
                counting=activity,
            )
        seconds = time.perf_counter() - began
        heartbeat.close()
        size = sum(file.stat().st_size for file in index.folder.iterdir())
        print(
            f"index: {len(index)} records in {seconds:.0f} s by {args.workers} processes "
            f"({len(index) / seconds:.0f} a second), {size / 1e6:.1f} MB, {size / len(index):.0f} bytes a record"
        )
        print(f"limits: start-up {START_LIMIT_SECONDS} s, anonymous memory {MEMORY_LIMIT_MB} MB", flush=True)
        rank = [sys.executable, __file__, "--rank-of", str(path), str(model), str(index.folder)]
        sys.exit(
            subprocess.run([*rank, "--read", str(args.read), "--workers", str(args.workers)], check=False).returncode
        )


if __name__ == "__main__":
    main()
