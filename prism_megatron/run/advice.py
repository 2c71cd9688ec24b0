"""The command that goes on with a run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from prism_megatron.conversion.checkpoints.folder import latest
from prism_megatron.run.files import CHECKPOINTS


def how_to_go_on(output: Path) -> str:
    """What to type, in words; a run without a checkpoint is begun anew."""
    folder = shlex.quote(str(output))
    flags = f"--load {folder}" if latest(output / CHECKPOINTS) is not None else f"--output {folder} --resume auto"
    tool, python = shlex.quote(sys.argv[0]), "python " if sys.argv[0].endswith(".py") else ""
    if Path(sys.argv[0]).parts[-2:] == ("prism_megatron", "__main__.py"):
        tool, python = f"-m prism_megatron {sys.argv[1]}", "python "
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"go on with `{python}{tool} {flags}`"
    local, everywhere = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if local == everywhere:
        return f"go on with `torchrun --nproc-per-node {local} {tool} {flags}`"
    return f"go on with `{tool} {flags}` by the same torchrun on every host"
