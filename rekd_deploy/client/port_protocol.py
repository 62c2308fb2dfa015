"""What a port seems to speak, for the error of a client that spoke something else to it. torch-free."""

from __future__ import annotations

import socket
import ssl

from rekd_deploy.client.address import Address
from rekd_deploy.errors import ClientError, InsecureServerError, RejectedError, ServerUnavailableError

_SECONDS = 0.5
_ENOUGH = 4096
_SETTINGS = 4
"""Type of the frame that an HTTP/2 server, such as gRPC's, sends first; it stands behind three bytes of length."""
_TLS_IS_SPOKEN = ("certificate_verify_failed", "verification check failed", "peer name")
"""What TLS libraries say of a certificate that is not trusted."""
_NAMES = {"grpc": "gRPC", "http": "HTTP"}


def with_protocol(error: ClientError, address: Address) -> ClientError:
    """The error of the same kind that says what the port speaks, if that is not what the address asks for; else the
    error itself. Connects to the port once or twice, for a second or two at most."""
    if type(error) not in (ServerUnavailableError, InsecureServerError, RejectedError):
        return error
    if any(sign in str(error).lower() for sign in _TLS_IS_SPOKEN):
        return error
    plain = _plain_protocol(address)
    if plain is not None:
        spoken = _NAMES[plain] + (" without TLS" if address.encrypted else "")
        fix = Address(plain, False, address.host, address.port)
    elif not address.encrypted and _speaks_tls(address):
        spoken, fix = "TLS", Address(address.protocol, True, address.host, address.port)
    else:
        return error
    if fix == address:
        return error
    wanted = _NAMES[address.protocol] + (" with TLS" if address.encrypted else "")
    return type(error)(
        f"port {address.port} of {address.host} seems to speak {spoken}, but {address} "
        f"asks for {wanted}; fix: give {fix}"
    )


def _plain_protocol(address: Address) -> str | None:
    """'grpc' or 'http', without encryption; None: neither."""
    host = address.host.strip("[]")
    question = f"GET /v2/health/live HTTP/1.1\r\nHost: {address.host_and_port}\r\nConnection: close\r\n\r\n"
    answer = b""
    try:
        with socket.create_connection((host, address.port), _SECONDS) as connection:
            connection.sendall(question.encode())
            while len(answer) < _ENOUGH and answer[3:4] != bytes([_SETTINGS]) and (more := connection.recv(_ENOUGH)):
                answer += more
    except OSError:
        pass  # what has come until then counts
    if answer.startswith(b"HTTP/1."):
        if b"HTTPS" in answer:  # "The plain HTTP request was sent to HTTPS port"
            return None
        # a proxy may speak both on one port, and route gRPC alone
        asked = address.protocol == "grpc" and not address.encrypted
        return None if asked and answer[8:12] != b" 200" else "http"
    return "grpc" if answer[3:4] == bytes([_SETTINGS]) else None


def _speaks_tls(address: Address) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent over it
    host = address.host.strip("[]")
    try:
        with socket.create_connection((host, address.port), _SECONDS) as connection:
            context.wrap_socket(connection, server_hostname=host).close()
        return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False
