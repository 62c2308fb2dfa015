"""Stand-ins for Triton: Python scripts that are started in its place. And what looks at processes."""

import http.client
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

from rekd_deploy.server.program import TritonProgram
from rekd_deploy.server.service import Service
from rekd_deploy.server.status import running_states

READY = """
import http.server, sys
port = next(int(a.split("=")[1]) for a in sys.argv if a.startswith("--http-port"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class FakeTriton(TritonProgram):
    def __init__(self, folder, script):
        super().__init__(folder / "tritonserver", folder)
        self.executable.write_text(f"#!{sys.executable}\n{script}")
        self.executable.chmod(0o755)

    def check_servable(self, root, manifest):
        pass


def wait_until(condition, seconds=20.0):
    """Until the condition holds; nobody answers: not yet."""
    until = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if condition():
                return
        assert time.monotonic() < until
        time.sleep(0.02)


def send(port, method, path, body=None, tls=None, **headers):
    kind, options = (http.client.HTTPSConnection, {"context": tls}) if tls else (http.client.HTTPConnection, {})
    with closing(kind("localhost", port, timeout=20, **options)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def children_of(process_id, deep=False):
    """Process ids of the children; deep: and of theirs."""
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    found = list(map(int, children))
    return found + [each for child in found for each in children_of(child, True)] if deep else found


def is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


class Running:
    """A service in a thread of its own, ready; the server's lines."""

    def __init__(self, server, limit, lines=None):
        self.server, self.lines = server, [] if lines is None else lines
        self.stopped, ready = threading.Event(), threading.Event()
        service = Service(server, limit, self.lines.append)
        self.ended = ThreadPoolExecutor(1).submit(service.run, ready.set, self.stopped)
        assert ready.wait(120)

    def kill(self):
        os.kill(self.server.process_id, signal.SIGKILL)

    def error(self):
        error = self.ended.exception(60)
        assert self.server.process_id is None and running_states() == []
        return error
