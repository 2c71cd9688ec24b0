"""Plays cases in a process of their own: pickled ``plays.Case`` in a file, one line of JSON for each on the way.

``python -m prism_megatron.forecast FILE`` prints, for each case, ``{"counted": …}`` or ``{"error": …}``.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from prism_megatron.engine.dry.watch import DevicePassError
from prism_megatron.errors import PrismError
from prism_megatron.forecast.plays import Case, play


def _line(case: Case) -> dict[str, object]:
    begun = time.process_time()
    try:
        counted = play(case)
    except (DevicePassError, PrismError) as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001  # whatever torch raises is what the case has come to
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        place = f"{ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}" if ours else "?"
        return {"error": f"{type(error).__name__}: {error} at {place}"}
    return {"counted": asdict(counted), "cpu_seconds": time.process_time() - begun}


def main() -> None:
    """Play the cases of the file that is named."""
    cases: list[Case] = pickle.loads(Path(sys.argv[1]).read_bytes())
    for case in cases:
        print(json.dumps(_line(case)), flush=True)


if __name__ == "__main__":
    main()
