"""No error of a library leaks: each failure to talk to a server has a type of its own."""

import socket
import threading
from contextlib import closing, suppress

import numpy as np
import pytest
import trustme
from proxies import Proxy, server_context

from rekd_deploy import Client, RetryPolicy, TlsSettings, errors
from rekd_deploy.client.connection import checked_headers
from rekd_deploy.client.protocols import GrpcTransport, HttpTransport
from rekd_deploy.client.transport import _STATUS_ERRORS, Request, open_transport
from rekd_deploy.errors import ClientError, InsecureServerError, RejectedError, ServerUnavailableError

ADDRESSES = {GrpcTransport: ("localhost:8001", "grpc://[::1]:8001", "grpcs://localhost:8001")}
ADDRESSES |= {HttpTransport: ("http://127.0.0.1:8000", "https://127.0.0.1:8000/")}
NO_ADDRESS = ["", "localhost", "localhost:", "localhost:0", "localhost:99999", "ftp://a:1", "http://a b:1", "http://h:1/x"]


def test_addresses_headers_and_tls_settings_that_cannot_be_used(tmp_path, roots):
    for kind, url in ((kind, url) for kind, urls in ADDRESSES.items() for url in urls):
        with closing(open_transport(url, 1.0)) as transport:
            assert type(transport) is kind, url
    for url in NO_ADDRESS:
        with pytest.raises(ClientError, match="is no address"):
            open_transport(url, 1.0)
    for name, value in BAD_HEADERS:
        with pytest.raises(ClientError, match="the protocol" if value == "1" else "header"):
            checked_headers({name: value})
    (nonsense := tmp_path / "nonsense.pem").write_text("no certificate")
    for made, complaint in (
        (lambda: TlsSettings(tmp_path / "nowhere.pem"), r"nowhere\.pem cannot be read: No such file"),
        (lambda: TlsSettings(roots, certificate=roots), "go together"),
        (lambda: Client("localhost:1", tls=TlsSettings()), "not encrypted, but TLS settings are given; give grpcs"),
        *((lambda url=url, settings=settings: Client(url, tls=settings), "TLS files cannot be used")
          for url in ("grpcs://localhost:1", "https://localhost:1")
          for settings in (TlsSettings(nonsense), TlsSettings(roots, roots, nonsense)))):  # fmt: skip
        with pytest.raises(ClientError, match=complaint):
            made()


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture(params=["", "http://"], ids=["grpc", "http"])
def url(request, listener):
    return f"{request.param}127.0.0.1:{listener.getsockname()[1]}"


def failure(url, timeout=5.0):
    with closing(open_transport(url, timeout)) as transport, pytest.raises(ClientError) as error:
        transport.model_versions("rekd", timeout)
    assert "\n" not in str(error.value)
    return type(error.value), str(error.value)


def test_nobody_listens_and_a_closed_transport_says_so(listener, url):
    kind, said = failure(url, timeout=0.3)
    assert kind is errors.DeadlineError and "0.3 s" in said
    listener.close()
    kind, said = failure(url)
    assert kind is ServerUnavailableError and f"at {url} (" in said and "start rekd-serve" in said
    transport = open_transport(url, 1.0)
    transport.close()
    with pytest.raises(ServerUnavailableError, match="cannot be used"):
        transport.submit("rekd", {"ids": np.zeros((1, 1))}, ("mask",)).result(5)


@pytest.fixture
def answering(listener):
    def serve(content):
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(content)
    yield lambda content: threading.Thread(target=serve, args=(content,), daemon=True).start()
    listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("content", [b"SSH-2.0-nonsense\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b""])
def test_something_else_answers(answering, url, content):
    answering(content)
    assert failure(url)[0] is ServerUnavailableError


HTTP = [(503, b'{"error": "Exceeds maximum queue size"}', errors.ServerBusyError, "queue"),
        (504, b"", errors.DeadlineError, "No"),
        (404, b'{"error": "Request for unknown model: \'rekd\' is not found"}', errors.ModelMissingError, "'rekd'"),
        (302, b"<html>moved", RejectedError, "moved")]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "kind", "says"), HTTP)
def test_http_statuses(answering, listener, status, body, kind, says):
    answering(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body))
    found, said = failure(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert found is kind and says in said


MESSAGES = [(status, "why\nmore", kind) for status, kind in _STATUS_ERRORS.items()]
MESSAGES += [(status, "why\nmore", RejectedError) for status in ("INVALID_ARGUMENT", "UNKNOWN", "400", "500")]
MESSAGES += [("400", "Request for unknown model: why", errors.ModelMissingError),
             ("400", "Request for unknown model: 'why' version 1 is not at ready state", errors.ServerUnavailableError),
             ("500", "Stub process 'why_0_0' is not healthy.", errors.ServerUnavailableError),
             ("UNAVAILABLE", "This protocol is restricted: why", RejectedError),
             ("UNAVAILABLE", "Exceeds maximum queue size: why", errors.ServerBusyError),
             ("UNAVAILABLE", "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED: why", InsecureServerError),
             ("400", "[request id: order-17] why", RejectedError)]  # fmt: skip


@pytest.mark.parametrize(("status", "message", "kind"), MESSAGES)
def test_status_and_message_have_their_error(status, message, kind):
    with closing(open_transport("host:1", 3.0)) as transport:
        error = transport._failure(Request("rekd", 3.0, request_id="order-17"), status, message)
    assert type(error) is kind
    assert "why" in str(error) and "more" not in str(error) and str(error).count("order-17") == 1


BAD_HEADERS = [("a b", "x"), ("", "x"), ("é", "x"), ("a", "x\ny"), ("a", "é"), ("a", 7), (7, "a")]
BAD_HEADERS += [(name, "1") for name in ("Content-Length", "Transfer-Encoding", "grpc-timeout", "trace-bin")]


AUTHORITY = trustme.CA()


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "roots.pem"
    AUTHORITY.cert_pem.write_to_path(path)
    return path


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
@pytest.mark.parametrize("mistake", ["unknown root", "another name", "no TLS"])
def test_servers_that_are_not_trusted(roots, listener, answering, scheme, mistake):
    answering(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    known = trustme.CA() if mistake == "unknown root" else AUTHORITY
    context = server_context(known, "elsewhere.example" if mistake == "another name" else "127.0.0.1")
    retry = RetryPolicy(attempts=3, first_pause=0.5, jitter=lambda: 0.0)
    with Proxy(listener.getsockname()[1], None if mistake == "no TLS" else context) as proxy:
        client = Client(f"{scheme}://127.0.0.1:{proxy.port}", tls=TlsSettings(roots), retry=retry, timeout=5.0)
        with client, pytest.raises(InsecureServerError, match="no trusted TLS connection to"):
            client.predict(["good"])
        assert proxy.connections <= 2, "trying again would not help; without TLS, gRPC connects twice"
