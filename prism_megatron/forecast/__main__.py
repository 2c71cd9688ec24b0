"""Plays cases in a process of their own: a file of JSON in (``case_file``), a line of JSON out for each.

``python -m prism_megatron.forecast FILE`` prints, for each case, ``{"counted": …}`` or ``{"error": …}``.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from prism_megatron.engine.dry.watch import DevicePassError
from prism_megatron.engine.launch import die_with_parent
from prism_megatron.errors import PrismError
from prism_megatron.forecast.case_file import read_cases
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
    """Play the cases of the file that is named, unless the command that wants them ends."""
    die_with_parent()
    for case in read_cases(Path(sys.argv[1])):
        print(json.dumps(_line(case)), flush=True)


if __name__ == "__main__":
    main()
