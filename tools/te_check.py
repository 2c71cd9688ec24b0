"""Does what we pass to Transformer Engine fit its signatures? ``make te-check``; needs no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.terminal import guarded


def main() -> int:
    from prism_megatron.jobs.te_check import check_signatures

    return 0 if check_signatures() else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
