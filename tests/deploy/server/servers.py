"""Stand-ins for Triton: Python scripts that are started in its place."""

from __future__ import annotations

import os
import sys

from rekd_deploy.server.program import TritonProgram

READY = """
import http.server, sys
port = next(int(a.split("=")[1]) for a in sys.argv if a.startswith("--http-port"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Answers every question with yes."""


class FakeTriton(TritonProgram):
    """A Python script in place of tritonserver."""

    has_gpu_metrics = False
    executable = caches = None

    def __init__(self, folder, script):
        self.executable = folder / "tritonserver"
        self.executable.write_text(f"#!{sys.executable}\n{script}")
        self.executable.chmod(0o755)

    def place_backends(self, folder):
        return folder

    def environment(self):
        return dict(os.environ)

    def check_servable(self, root, manifest):
        pass
