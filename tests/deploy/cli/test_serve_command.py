"""rekd-serve: what it refuses, and that its options reach the server."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading

import pytest


def serve(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rekd_deploy.cli.serve", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--host", "0.0.0.0"], 1, "neither a login nor TLS"),
        (["--json"], 2, "add --status"),
        (["--ca", "roots.pem"], 2, "add --status"),
        (["--tritonserver", "/nowhere"], 1, "is not an executable file"),
        (["--restart", "always"], 2, "always"),
        (["--status", "here"], 1, "is no address"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(arguments, code, message):
    given = arguments if "--status" in arguments else ["somewhere", *arguments]
    answer = serve(*given)
    assert answer.returncode == code and message in answer.stderr and "Traceback" not in answer.stderr
    assert answer.stdout == ""


@pytest.mark.parametrize("form", ["{}", "grpcs://{}", "https://{}"])
def test_a_port_of_another_protocol_is_one_line(form):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # as Triton's HTTP port answers a request for its health
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        answer = serve("--status", form.format(place))
        server.shutdown()
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1, answer.stderr
    assert "; fix: " in answer.stderr and ("http://HOST:8000" in answer.stderr or "without TLS" in answer.stderr)


def test_help_says_what_is_at_stake():
    text = " ".join(serve("--help").stdout.split())
    assert "--expose-without-login-or-tls" in text and "whoever reaches it may use the model" in text
