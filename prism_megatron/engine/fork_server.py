"""The first module that the fork server of ``launch.py`` imports, before torch and before any rank exists."""

from __future__ import annotations

import os
import signal

from prism_megatron.engine.launch import LAUNCHER_PID, die_with_parent, quiet_vendors

if LAUNCHER_PID in os.environ:
    # Taken out, so that no process the ranks start mistakes itself for the fork server.
    die_with_parent(int(os.environ.pop(LAUNCHER_PID)))
    # A signal to the whole process group is the launcher's to answer; the ranks take it from there.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_vendors()
