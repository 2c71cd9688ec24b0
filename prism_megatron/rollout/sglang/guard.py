"""Runs an SGLang server that cannot outlive the process that started it.

Started by ``sglang_server`` with SGLang's own interpreter: it imports nothing of this project. The first argument is
the reading end of a pipe whose other end the parent holds. When the parent ends, however it ends, the kernel closes
that end and this process kills its whole group: the server, its schedulers and its tokenizer workers.
"""

import os
import runpy
import signal
import sys
import threading


def _end_with_parent(pipe: int) -> None:
    os.read(pipe, 1)  # returns once the other end is closed; nothing is ever written
    os.killpg(os.getpgrp(), signal.SIGKILL)


# The server's own child processes import this file again, under another name.
if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, args=(int(sys.argv.pop(1)),), daemon=True).start()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
