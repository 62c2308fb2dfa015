"""No error of a library leaks: each failure to talk to a server has a type of its own."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest
import trustme
from proxies import Proxy, server_context

from rekd_deploy.client.client import Client
from rekd_deploy.client.connection import Address, RetryPolicy, TlsSettings, checked_headers, with_protocol
from rekd_deploy.client.transport import _STATUS_ERRORS, open_transport, typed_error
from rekd_deploy.client.transport_grpc import GrpcTransport
from rekd_deploy.client.transport_http import HttpTransport
from rekd_deploy.errors import (
    ClientError,
    DeadlineError,
    InsecureServerError,
    ModelMissingError,
    RejectedError,
    ServerBusyError,
    ServerUnavailableError,
)

SCHEMES = ["", "http://"]


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("localhost:8001", GrpcTransport),
        ("grpc://[::1]:8001", GrpcTransport),
        ("grpcs://localhost:8001", GrpcTransport),
        ("http://127.0.0.1:8000", HttpTransport),
        ("http://127.0.0.1:8000/", HttpTransport),
        ("https://127.0.0.1:8000/", HttpTransport),
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


def failure(url, timeout=5.0, **options):
    transport = open_transport(url, timeout, **options)
    try:
        with pytest.raises(ClientError) as error:
            transport.model_versions("rekd", timeout)
        return error.value
    finally:
        transport.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_listens(listener, scheme):
    port = listener.getsockname()[1]
    listener.close()
    error = failure(f"{scheme}127.0.0.1:{port}")
    assert type(error) is ServerUnavailableError and f"127.0.0.1:{port}" in str(error) and "rekd-serve" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_answers(listener, scheme):
    error = failure(f"{scheme}127.0.0.1:{listener.getsockname()[1]}", timeout=0.3)
    assert type(error) is DeadlineError and "0.3 s" in str(error)


@pytest.fixture
def answering(listener):
    """A function: bytes -> port where everyone is answered with them."""
    threads = []

    def answer(content, pieces=1, pause=0.0):
        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    step = max(len(content) // pieces, 1)
                    for start in range(0, len(content), step):
                        connection.sendall(content[start : start + step])
                        if stop.wait(pause):
                            return

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[0].start()
        return listener.getsockname()[1]

    stop = threading.Event()
    yield answer
    stop.set()
    listener.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("answer", [b"SSH-2.0-nonsense\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b""])
def test_something_else_answers(answering, scheme, answer):
    error = failure(f"{scheme}127.0.0.1:{answering(answer)}")
    assert type(error) is ServerUnavailableError


def test_an_answer_in_drops_ends_in_time(answering):
    port = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000, pieces=50, pause=0.1)
    error = failure(f"http://127.0.0.1:{port}", timeout=0.4)
    assert type(error) is DeadlineError and "too slowly" in str(error)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_closed_transport_says_so(scheme):
    transport = open_transport(f"{scheme}127.0.0.1:1", 1.0)
    transport.close()
    with pytest.raises(ServerUnavailableError, match="cannot be used"):
        transport.submit("rekd", {"ids": np.zeros((1, 1))}, ("mask",)).result(5)


def http_answer(status, body):
    return b"HTTP/1.1 %d No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (503, b'{"error": "Exceeds maximum queue size"}', ServerBusyError, "queue"),
        (429, b"slow down", ServerBusyError, "slow down"),
        (502, b"<html>bad gateway", ServerUnavailableError, "bad gateway"),
        (504, b"", DeadlineError, "No"),
        (404, b'{"error": "Request for unknown model: \'rekd\' is not found"}', ModelMissingError, "'rekd'"),
        (401, b"who are you?", RejectedError, "who are you"),
        (400, b'{"error": "bad\\nrequest"}', RejectedError, "bad"),
        (302, b"", RejectedError, "No"),
    ],
)
def test_http_statuses(answering, status, body, kind, says):
    error = failure(f"http://127.0.0.1:{answering(http_answer(status, body))}")
    assert type(error) is kind and says in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("status", [*_STATUS_ERRORS, "INVALID_ARGUMENT", "INTERNAL", "UNKNOWN", "400", "500"])
def test_every_status_has_its_error(status):
    error = typed_error(status, "why\nmore", "host:1", "rekd", timeout=3.0)
    assert type(error) is _STATUS_ERRORS.get(status, RejectedError)
    assert "why" in str(error) and "more" not in str(error)


def test_what_only_the_message_tells():
    def kind(status, message):
        return type(typed_error(status, message, "host:1", "rekd", timeout=3.0))

    assert kind("400", "Request for unknown model: 'rekd' is not found") is ModelMissingError
    assert kind("UNAVAILABLE", "This protocol is restricted, expecting header 'x'") is RejectedError
    assert kind("UNAVAILABLE", "Exceeds maximum queue size") is ServerBusyError
    assert kind("UNAVAILABLE", "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED") is InsecureServerError


def test_errors_name_the_request_once():
    for status in ("INVALID_ARGUMENT", "DEADLINE_EXCEEDED"):
        error = typed_error(status, "why", "host:1", "rekd", timeout=3.0, request_id="order-17")
        assert "request order-17" in str(error)
    error = typed_error("400", "[request id: order-17] why", "host:1", "rekd", timeout=3.0, request_id="order-17")
    assert str(error).count("order-17") == 1


# headers


def test_headers_are_lower_case_and_checked():
    assert checked_headers({"Authorization": "Bearer x", "x-y.z_1": ""}) == {"authorization": "Bearer x", "x-y.z_1": ""}
    for name, value in [("a b", "x"), ("", "x"), ("é", "x"), ("a", "x\ny"), ("a", "é"), ("a", 7), (7, "a")]:
        with pytest.raises(ClientError, match="header"):
            checked_headers({name: value})
    for name in ("Content-Length", "Transfer-Encoding", "grpc-timeout", "trace-bin"):
        with pytest.raises(ClientError, match="belongs to the protocol"):
            checked_headers({name: "1"})


# TLS


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def roots(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "roots.pem"
    authority.cert_pem.write_to_path(path)
    return path


def test_tls_settings_that_cannot_be_used(tmp_path, roots):
    with pytest.raises(ClientError, match=r"nowhere\.pem cannot be read: No such file"):
        TlsSettings(tmp_path / "nowhere.pem")
    with pytest.raises(ClientError, match="go together"):
        TlsSettings(roots, certificate=roots)
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    for url in ("grpcs://localhost:1", "https://localhost:1"):
        for settings in (TlsSettings(nonsense), TlsSettings(roots, roots, nonsense)):
            with pytest.raises(ClientError, match="TLS files cannot be used"):
                open_transport(url, 1.0, tls=settings)
    with pytest.raises(ClientError, match="not encrypted, but TLS settings are given; give grpcs:// or https://"):
        Client("localhost:1", tls=TlsSettings())


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
@pytest.mark.parametrize("mistake", ["unknown root", "another name", "no TLS"])
def test_servers_that_are_not_trusted(authority, roots, listener, scheme, mistake):
    context = {
        "unknown root": lambda: server_context(trustme.CA()),
        "another name": lambda: server_context(authority, "elsewhere.example"),
        "no TLS": lambda: None,
    }[mistake]()
    with Proxy(listener.getsockname()[1], context) as proxy:
        if mistake == "no TLS":
            threading.Thread(target=_greet, args=(listener,), daemon=True).start()
        client = Client(
            f"{scheme}://127.0.0.1:{proxy.port}",
            tls=TlsSettings(roots),
            retry=RetryPolicy(attempts=3, first_pause=0.5, jitter=lambda: 0.0),
            timeout=5.0,
        )
        with client, pytest.raises(InsecureServerError, match="no trusted TLS connection to"):
            client.predict(["good"])
        # trying again would not help; without TLS, gRPC connects twice, and what the port speaks is looked at
        assert proxy.connections <= (3 if mistake == "no TLS" else 1)


def _greet(listener, status="400 Bad Request"):
    connection, _ = listener.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())


@pytest.mark.parametrize(("status", "known"), [("200 OK", True), ("503 Service Unavailable", False)])
def test_a_proxy_for_grpc_that_also_speaks_http_is_taken_at_its_word(listener, status, known):
    """It may route gRPC alone, and what it said of the server behind it is the reason."""
    address = Address.parse(f"127.0.0.1:{listener.getsockname()[1]}")
    greeting = threading.Thread(target=_greet, args=(listener, status), daemon=True)
    greeting.start()
    error = ServerUnavailableError("no healthy upstream")
    found = with_protocol(error, address)
    assert (found is error) is not known and ("seems to speak HTTP" in str(found)) is known
