#!/usr/bin/env python
"""Is ours the same model as transformers', forward and backward, in every layout? Prints a table: ``make parity``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import guarded

NUM_RANKS = 8


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when every cell is within its tolerance, else 1."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # every rank would repeat what vendors say about each other
    started = time.monotonic()

    from prism_megatron.parity.matrix import LAYOUTS, Bench, parity_cells, recompute_results
    from prism_megatron.parity.table import HEADER, RECOMPUTE_HEADER, cell_line, recompute_line
    from prism_megatron.parity.tiny import MODELS, prepare
    from prism_megatron.testing import GlooWorld

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    arguments = parser.parse_args(argv)

    verdicts = []
    with tempfile.TemporaryDirectory(prefix="parity-") as root, GlooWorld(NUM_RANKS) as gloo:
        folders = {model: Path(root) / model for model in arguments.models}
        shapes = {model: prepare(model, folder) for model, folder in folders.items()}
        bench = Bench(gloo.run, folders, shapes, arguments.layouts)
        print(f"Against transformers in float32\n{HEADER}", flush=True)
        for cell in parity_cells(bench):
            print(cell_line(cell), flush=True)
            verdicts.append(cell.ok)
        print(f"\nRecomputed, against the same layout without recompute\n{RECOMPUTE_HEADER}", flush=True)
        for result in recompute_results(bench):
            print(recompute_line(result), flush=True)
            verdicts.append(result.ok)
    seconds = time.monotonic() - started
    print(f"\n{sum(verdicts)} of {len(verdicts)} lines within tolerance or not applicable; {seconds:.0f} s")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
