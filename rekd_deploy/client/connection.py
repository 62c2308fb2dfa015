"""How a client reaches a server: address, TLS, headers, retries; and what a port seems to speak. torch-free."""

from __future__ import annotations

import random
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rekd_deploy.errors import ClientError, InsecureServerError, RejectedError, ServerUnavailableError

_SCHEMES = {"grpc": ("grpc", False), "grpcs": ("grpc", True), "http": ("http", False), "https": ("http", True)}
_HEADER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_RESERVED_HEADERS = ("content-length", "content-type", "host", "inference-header-content-length", "transfer-encoding")
"""The protocol's own."""
_PROBE_SECONDS = 0.5
_PROBE_BYTES = 4096
_SETTINGS = b"\x04"
"""Type of the frame that an HTTP/2 server, such as gRPC's, sends first; it stands behind three bytes of length."""
_TLS_IS_SPOKEN = ("certificate_verify_failed", "verification check failed", "peer name")
"""What TLS libraries say of a certificate that is not trusted."""
_NAMES = {"grpc": "gRPC", "http": "HTTP"}


@dataclass(frozen=True)
class Address:
    """A server's address.

    Raises:
        ClientError: see ``parse``.
    """

    protocol: str
    """'grpc' or 'http'."""
    encrypted: bool
    """Whether TLS is spoken."""
    host: str
    """Name or address; an IPv6 address in brackets."""
    port: int

    @classmethod
    def parse(cls, url: str) -> Address:
        """HOST:PORT or grpc://HOST:PORT, grpcs://, http:// or https://HOST:PORT.

        Raises:
            ClientError: the text is no such address.
        """
        match = re.fullmatch(rf"(?:({'|'.join(_SCHEMES)})://)?([^\s/:@]+|\[[0-9a-fA-F:.]+\]):(\d{{1,5}})/?", url)
        if not match or not 0 < int(match[3]) < 65536:
            raise ClientError(
                f"'{url}' is no address; give HOST:PORT for gRPC (localhost:8001) or http://HOST:PORT; with TLS "
                "grpcs://HOST:PORT or https://HOST:PORT"
            )
        protocol, encrypted = _SCHEMES[match[1] or "grpc"]
        return cls(protocol, encrypted, match[2], int(match[3]))

    @property
    def host_and_port(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        scheme = next(name for name, kind in _SCHEMES.items() if kind == (self.protocol, self.encrypted))
        return self.host_and_port if scheme == "grpc" else f"{scheme}://{self.host_and_port}"


@dataclass(frozen=True)
class TlsSettings:
    """Which TLS server is trusted, and the client's own certificate. Files are PEM.

    Raises:
        ClientError: a file cannot be read, or only one of certificate and key is given.
    """

    root_certificates: Path | None = None
    """Certificates that the server's must descend from; None: those that the system (gRPC: the library) trusts."""
    certificate: Path | None = None
    """The client's own certificate, with those between it and its root; None: it shows none."""
    key: Path | None = None
    """The private key of ``certificate``, not encrypted."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ClientError("a client certificate and its key go together; give both or neither")
        for file in (self.root_certificates, self.certificate, self.key):
            if file is not None:
                try:
                    Path(file).read_bytes()
                except OSError as error:
                    raise ClientError(f"the TLS file {file} cannot be read: {error.strerror}") from None

    def context(self) -> ssl.SSLContext:
        """The same settings for HTTP.

        Raises:
            ClientError: a file holds no certificate or key, or they do not belong together.
        """
        try:
            context = ssl.create_default_context(cafile=self.root_certificates)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password="")  # no prompt at a terminal
        except (ssl.SSLError, ValueError) as error:
            raise ClientError(f"the TLS files cannot be used: {error}") from None
        return context


@dataclass(frozen=True)
class RetryPolicy:
    """When a request that failed is sent again: if nothing answers, or the server's queue is full.

    That may pass by itself; a refusal, a time-out and a wrong model do not. A response depends on its request alone,
    so sending one twice does no harm. Before each further attempt comes a pause of twice the length, shortened at
    random by up to half, so that clients which failed together do not come back together.
    """

    attempts: int = 4
    """Most times that a request is sent; 1: never again."""
    first_pause: float = 0.1
    """Seconds before the second attempt, at most."""
    longest_pause: float = 5.0
    """Seconds; pauses do not grow beyond."""
    jitter: Callable[[], float] = random.random
    """Numbers within 0..1, uniform; the source of chance."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ClientError(f"attempts is {self.attempts}; it must be at least 1")
        if not 0 <= self.first_pause <= self.longest_pause:
            raise ClientError(
                f"first_pause is {self.first_pause:g} s; it must lie within 0..longest_pause ({self.longest_pause:g} s)"
            )

    def pause(self, error: Exception, attempts_made: int, remaining: float) -> float | None:
        """Seconds to wait before the next attempt; None: there is none.

        Args:
            error: why the last attempt failed.
            attempts_made: so far, at least 1.
            remaining: seconds that the call may still take; a pause that would use them up is not begun.
        """
        if not isinstance(error, ServerUnavailableError) or attempts_made >= self.attempts:
            return None
        longest = min(self.first_pause * 2 ** (attempts_made - 1), self.longest_pause)
        pause = longest * (1 - self.jitter() / 2)
        return pause if pause < remaining else None


def checked_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Headers for every request, names in lower case (as gRPC wants them, HTTP does not care).

    Raises:
        ClientError: a name or value that cannot be sent, or a name that the protocol itself uses.
    """
    checked = {}
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ClientError(f"the header name {name!r} has other signs than letters, digits, '.', '_' and '-'")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise ClientError(f"the value of the header '{name}' must be one line of printable ASCII")
        if name.lower() in _RESERVED_HEADERS or name.lower().startswith("grpc-") or name.lower().endswith("-bin"):
            raise ClientError(f"the header '{name}' belongs to the protocol; give another")
        checked[name.lower()] = value
    return checked


def with_protocol(error: ClientError, address: Address) -> ClientError:
    """The error of the same kind that says what the port speaks, if the address names another protocol; else the
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
        f"port {address.port} of {address.host} seems to speak {spoken}, but {address} asks for {wanted}; "
        f"fix: give {fix}"
    )


def _plain_protocol(address: Address) -> str | None:
    """'grpc' or 'http', without encryption; None: neither."""
    host = address.host.strip("[]")
    request = f"GET /v2/health/live HTTP/1.1\r\nHost: {address.host_and_port}\r\nConnection: close\r\n\r\n"
    response = b""
    try:
        with socket.create_connection((host, address.port), _PROBE_SECONDS) as connection:
            connection.sendall(request.encode())
            while len(response) < _PROBE_BYTES and response[3:4] != _SETTINGS:
                if not (more := connection.recv(_PROBE_BYTES)):
                    break
                response += more
    except OSError:
        pass  # what has come until then counts
    if response.startswith(b"HTTP/1."):
        if b"HTTPS" in response:  # "The plain HTTP request was sent to HTTPS port"
            return None
        # a proxy may speak both on one port, and route gRPC alone
        as_wanted = address.protocol == "grpc" and not address.encrypted
        return None if as_wanted and response[8:12] != b" 200" else "http"
    return "grpc" if response[3:4] == _SETTINGS else None


def _speaks_tls(address: Address) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent over it
    host = address.host.strip("[]")
    try:
        with socket.create_connection((host, address.port), _PROBE_SECONDS) as connection:
            context.wrap_socket(connection, server_hostname=host).close()
        return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False
