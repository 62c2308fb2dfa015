"""rekd-serve: what it refuses, and that its options reach the server."""

import http.server
import subprocess
import sys
import threading

import pytest


def serve(*arguments):
    command = [sys.executable, "-m", "rekd_deploy.cli.serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("arguments", "code", "message"), [
    ("somewhere --host 0.0.0.0", 1, "neither a login nor TLS"), ("somewhere --json", 2, "add --status"),
    ("somewhere --ca roots.pem", 2, "add --status"),
    ("somewhere --tritonserver /nowhere", 1, "is not an executable file"), ("somewhere --restart always", 2, "always"),
    ("--status here", 1, "is no address")])
def test_refusals(arguments, code, message):
    answer = serve(*arguments.split())
    assert answer.returncode == code and message in answer.stderr and "Traceback" not in answer.stderr
    assert answer.stdout == ""


class AsTriton(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # as its HTTP port answers a request for its health
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_): ...


@pytest.mark.parametrize("form", ["{}", "grpcs://{}", "https://{}"])
def test_a_port_of_another_protocol_is_one_line(form):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), AsTriton) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = serve("--status", form.format(f"127.0.0.1:{server.server_port}"))
        server.shutdown()
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1, answer.stderr
    assert "; fix: " in answer.stderr and ("http://HOST:8000" in answer.stderr or "without TLS" in answer.stderr)


def test_help_says_what_is_at_stake():
    text = " ".join(serve("--help").stdout.split())
    assert "--expose-without-login-or-tls" in text and "whoever reaches it may use the model" in text
