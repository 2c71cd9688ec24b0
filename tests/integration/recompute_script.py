"""``prism-sft`` for test_recompute_auto.py: every rank writes down, in the folder named first, what it begins with."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from prism_megatron.commands import sft
from prism_megatron.commands.starting.on_ranks import main_on_ranks
from prism_megatron.config.stages.sft import SFTConfig

FOLDER = Path(sys.argv[1])


def run(config: SFTConfig) -> None:
    (FOLDER / f"rank{os.environ['RANK']}.json").write_text(json.dumps(asdict(config.recompute)), encoding="utf-8")
    sft.run(config)


if __name__ == "__main__":
    sys.exit(
        main_on_ranks(sys.argv[2:], parse=sft.parse, check=sft.check, run=run, foretell=sft.foretell, preload="torch")
    )
