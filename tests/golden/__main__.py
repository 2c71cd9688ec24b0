"""``make golden``: play the runs of ``runs.py`` and write their rows anew. What changed is what ``git diff`` shows."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from prism_megatron.testing import GlooWorld
from tests.golden.runs import RUNS, play, provenance, rows_of

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Record the runs named on the command line, or all."""
    with GlooWorld(4) as gloo, tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or RUNS:
            run, output = RUNS[name], Path(scratch) / name
            ended = gloo.run(play, name, output, parallel=run.parallel, num_ranks=run.ranks)[0]
            rows = rows_of(output)
            document = {"made with": provenance(name), "ended": ended, "rows": rows}
            (FOLDER / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {len(rows)} rows {ended}", flush=True)


if __name__ == "__main__":
    main()
