"""Stand-ins for Triton: Python scripts that are started in its place. And what looks at processes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rekd_deploy.server.program import TritonProgram

READY = """
import http.server, sys
port = next(int(a.split("=")[1]) for a in sys.argv if a.startswith("--http-port"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Answers every request with yes."""


class FakeTriton(TritonProgram):
    """A Python script in place of tritonserver."""

    def __init__(self, folder, script):
        super().__init__(folder / "tritonserver", folder)
        self.executable.write_text(f"#!{sys.executable}\n{script}")
        self.executable.chmod(0o755)

    def check_servable(self, root, manifest):
        pass


def wait_until(condition, seconds=20.0):
    """Until the condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def children_of(process_id):
    """Process ids of the children."""
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def is_alive(process_id):
    """Whether a process runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False
