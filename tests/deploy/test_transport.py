"""No error of a library leaks: each failure to talk to a server has a type of its own."""

from __future__ import annotations

import socket
import threading

import pytest

from rekd_deploy.errors import (
    ClientError,
    DeadlineError,
    ModelMissingError,
    RejectedError,
    ServerUnavailableError,
)
from rekd_deploy.transport import _STATUS_ERRORS, GrpcTransport, HttpTransport, _typed, open_transport


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("localhost:8001", GrpcTransport),
        ("grpc://[::1]:8001", GrpcTransport),
        ("http://127.0.0.1:8000", HttpTransport),
        ("http://127.0.0.1:8000/", HttpTransport),
    ],
)
def test_scheme_picks_the_transport(url, kind):
    transport = open_transport(url, 1.0)
    assert type(transport) is kind
    transport.close()


@pytest.mark.parametrize(
    "url", ["", "localhost", "localhost:", "localhost:0", "localhost:99999", "ftp://localhost:1", "http://a b:1", "http://h:1/x"]
)
def test_what_is_no_address(url):
    with pytest.raises(ClientError, match="is no address"):
        open_transport(url, 1.0)


@pytest.fixture
def listener():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener


def failure(url, timeout=5.0):
    transport = open_transport(url, timeout)
    try:
        with pytest.raises(ClientError) as error:
            transport.model_versions("rekd", timeout)
        return error.value
    finally:
        transport.close()


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_nobody_listens(listener, scheme):
    port = listener.getsockname()[1]
    listener.close()
    error = failure(f"{scheme}127.0.0.1:{port}")
    assert type(error) is ServerUnavailableError and f"127.0.0.1:{port}" in str(error) and "rekd-serve" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_nobody_answers(listener, scheme):
    error = failure(f"{scheme}127.0.0.1:{listener.getsockname()[1]}", timeout=0.3)
    assert type(error) is DeadlineError and "0.3 s" in str(error)


@pytest.mark.parametrize("scheme", ["", "http://"])
@pytest.mark.parametrize("answer", [b"SSH-2.0-nonsense\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b""])
def test_something_else_answers(listener, scheme, answer):
    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    error = failure(f"{scheme}127.0.0.1:{listener.getsockname()[1]}")
    assert type(error) is ServerUnavailableError
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("status", [*_STATUS_ERRORS, "INVALID_ARGUMENT", "INTERNAL", "UNKNOWN", "400", "500"])
def test_every_status_has_its_error(status):
    from tritonclient.utils import InferenceServerException

    for prefix in ("StatusCode.", ""):
        error = _typed(InferenceServerException("why\nmore", status=prefix + status), "host:1", "rekd", 3.0)
        assert type(error) is _STATUS_ERRORS.get(status, RejectedError)
        assert "why" in str(error) and "more" not in str(error)


def test_unknown_model_by_its_message():
    from tritonclient.utils import InferenceServerException

    raised = InferenceServerException("Request for unknown model: 'rekd' is not found", "400")
    error = _typed(raised, "host:1", "rekd", 3.0)
    assert type(error) is ModelMissingError
