"""How a client reaches a server: address, TLS, headers, retries. torch-free."""

from __future__ import annotations

import random
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rekd_deploy.errors import ClientError, ServerUnavailableError

_SCHEMES = {"grpc": ("grpc", False), "grpcs": ("grpc", True), "http": ("http", False), "https": ("http", True)}
_HEADER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_PROTOCOL_HEADERS = re.compile(
    "content-length|content-type|host|inference-header-content-length|transfer-encoding|grpc-.*|.*-bin"
)


@dataclass(frozen=True)
class Address:
    """A server's address."""

    protocol: str
    """'grpc' or 'http'."""
    encrypted: bool
    """Whether TLS is spoken."""
    host: str
    """Name or address; an IPv6 address in brackets."""
    port: int

    @classmethod
    def parse(cls, url: str) -> Address:
        """HOST:PORT or grpc://HOST:PORT, grpcs://, http:// or https://HOST:PORT; ClientError: none of these."""
        match = re.fullmatch(rf"(?:({'|'.join(_SCHEMES)})://)?([^\s/:@]+|\[[0-9a-fA-F:.]+\]):(\d{{1,5}})/?", url)
        if not match or not 0 < int(match[3]) < 65536:
            raise ClientError(
                f"'{url}' is no address; give HOST:PORT for gRPC (localhost:8001) or http://HOST:PORT; with TLS "
                "grpcs://HOST:PORT or https://HOST:PORT"
            )
        return cls(*_SCHEMES[match[1] or "grpc"], match[2], int(match[3]))

    @property
    def host_and_port(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        scheme = next(name for name, kind in _SCHEMES.items() if kind == (self.protocol, self.encrypted))
        return self.host_and_port if scheme == "grpc" else f"{scheme}://{self.host_and_port}"


@dataclass(frozen=True)
class TlsSettings:
    """Which TLS server is trusted, and the client's own certificate; ClientError: files that cannot be used. PEM."""

    root_certificates: Path | None = None
    """Certificates that the server's must descend from; None: those that the system (gRPC: the library) trusts."""
    certificate: Path | None = None
    """The client's own certificate, with those between it and its root; None: it shows none."""
    key: Path | None = None
    """The private key of ``certificate``, not encrypted."""

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ClientError("a client certificate and its key go together; give both or neither")
        for file in filter(None, (self.root_certificates, self.certificate, self.key)):
            try:
                Path(file).read_bytes()
            except OSError as error:
                raise ClientError(f"the TLS file {file} cannot be read: {error.strerror}") from None

    def context(self) -> ssl.SSLContext:
        """The same settings for HTTP; ClientError: a file holds no certificate or key, or they do not match."""
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
        """Seconds to wait after the last attempt's error; None: no other, as where ``remaining`` would be used up."""
        if not isinstance(error, ServerUnavailableError) or attempts_made >= self.attempts:
            return None
        longest = min(self.first_pause * 2 ** (attempts_made - 1), self.longest_pause)
        pause = longest * (1 - self.jitter() / 2)
        return pause if pause < remaining else None


def checked_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """The headers, names in lower case, as gRPC wants them; ClientError: one that cannot be sent."""
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ClientError(f"the header name {name!r} has other signs than letters, digits, '.', '_' and '-'")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            raise ClientError(f"the value of the header '{name}' must be one line of printable ASCII")
        if _PROTOCOL_HEADERS.fullmatch(name.lower()):
            raise ClientError(f"the header '{name}' belongs to the protocol; give another")
    return {name.lower(): value for name, value in (headers or {}).items()}
