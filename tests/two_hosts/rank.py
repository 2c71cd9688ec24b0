"""One rank of ``run_align.py``, which stands still where something is to befall its host.

``python -m tests.two_hosts.rank PLACE STEP HOST FOLDER FLAG…``: ranks of HOST stop in step STEP (from 1) at PLACE,
write ``FOLDER/rank-N`` and go on once there is ``FOLDER/go``. PLACE is a phase of the step, at whose start they stand;
or ``commit``, where the first rank stands between the last byte of a checkpoint and the rename that makes it one. Ranks
of the other host go on until they have to wait.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism_megatron.commands.align import main
from prism_megatron.observability.activity import Activity
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 900.0


def stand(folder: Path) -> None:
    """Say that this rank is at its place, and wait for the word to go on."""
    (folder / f"rank-{os.environ['RANK']}").touch()
    wait_for((folder / "go").exists, seconds=PATIENCE_SECONDS, poll_seconds=0.05)


def watch_phases(place: str, step: int, reached: Callable[[], None]) -> None:
    """Call ``reached`` where the phase ``place`` of ``step`` begins, or where its checkpoint is about to be renamed."""
    plain = Activity.phase
    now: dict[str, Any] = {}

    @contextmanager
    def phase(self: Activity, name: str) -> Iterator[None]:
        now["step"] = self.step
        if name == place and self.step == step and threading.current_thread() is threading.main_thread():
            reached()
        with plain(self, name):
            yield

    Activity.phase = phase  # type: ignore[method-assign]
    if place == "commit":
        from prism_megatron.engine import saving

        commit = saving.commit

        def waiting(hidden: Path, folder: Path) -> None:
            if now.get("step") == step:
                reached()
            commit(hidden, folder)

        vars(saving)["commit"] = waiting


if __name__ == "__main__":
    place, step, host, folder, *flags = sys.argv[1:]
    if os.environ["GROUP_RANK"] == host:
        watch_phases(place, int(step), lambda: stand(Path(folder)))
    sys.argv = [str(ROOT / "tools" / "run_align.py"), *flags]
    sys.exit(main())
