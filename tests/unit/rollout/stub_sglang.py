"""A stand-in for the ``sglang`` package that answers every GET, with a worker process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

STUB = """
import json, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

arguments = json.load(open(sys.argv[sys.argv.index("--config") + 1]))
print("the stub has started", flush=True)
if arguments["model-path"].endswith("broken"):
    sys.exit("this model cannot be served")
if arguments["model-path"].endswith("slow"):
    time.sleep(600)  # until it is ended: one that is never ready
worker = subprocess.Popen(["sleep", "600"])
print("worker", worker.pid, flush=True)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


HTTPServer((arguments["host"], arguments["port"]), Handler).serve_forever()
"""


def stub_python(folder: Path) -> Path:
    """An interpreter, in ``folder``, that finds the stub as ``sglang``."""
    package = folder / "site" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(STUB)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python
