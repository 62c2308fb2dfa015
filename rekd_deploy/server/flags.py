"""The safe flags of a Triton server: settings in, command-line arguments out. Pure: nothing is read or started.

``rekd-serve`` starts its server with them, and the files in ``deploy/`` have the same, which a test holds: a server is
closed in the same ways wherever it runs.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from rekd_train.errors import ConfigError

LOOPBACK = "127.0.0.1"
PORT_FLAGS = {"grpc": "--grpc-port", "http": "--http-port", "metrics": "--metrics-port"}
"""The option that sets each interface's port, here and in Triton."""
KEY_HEADER = "rekd-admin"
"""HTTP header that carries the key of the restricted interfaces."""
GRPC_KEY_HEADER = f"triton-grpc-protocol-{KEY_HEADER}"
"""The same in gRPC's metadata, where Triton puts a prefix before it."""
_ADMIN_APIS = ("model-repository", "shared-memory", "trace", "logging")
"""What no client needs. Not model-config: clients read labels and preprocessing from it."""
_LARGEST_PORT = 65535


@dataclass(frozen=True)
class ServerSettings:
    """What a server serves, where it listens, and what it lets its clients do."""

    repository: str
    """Path of the model repository, as the server sees it."""
    host: str = LOOPBACK
    """IPv4 address for gRPC and HTTP."""
    metrics_host: str = LOOPBACK
    """IPv4 address for the Prometheus metrics."""
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    exposed: bool = False
    """Whether addresses other than loopback are meant: Triton has no login, and no TLS on HTTP. Anyone who reaches
    them may send requests, so it takes a closed network or a proxy before it. Then the statistics take the key, too."""
    reload: bool = False
    """Whether models may be loaded while it runs, by those who have the key; otherwise by no one. Then the server's own
    readiness no longer speaks for its models: probe /v2/models/rekd/ready."""
    gpu_metrics: bool = False
    """Whether the metrics include the GPUs'."""
    log_verbose: int = 0
    """Triton's verbosity; from 1 on, each request's id and way through the models are logged."""
    exit_seconds: int = 5
    """How long requests in flight may take when the server is told to end."""
    backends: str | None = None
    """Folder of the backends; None: where Triton looks by itself."""
    caches: str | None = None
    """Folder of the response caches; likewise."""
    python_memory_prefix: str | None = None
    """How the names of the python backend's own shared memory begin; None: Triton's choice."""

    def __post_init__(self) -> None:
        mistakes = []
        for field in ("host", "metrics_host"):
            address = getattr(self, field)
            try:
                loopback = ipaddress.IPv4Address(address).is_loopback
            except ValueError:
                mistakes.append(f"{field} '{address}' is no IPv4 address; give one like {LOOPBACK}")
                continue
            if not loopback and not self.exposed:
                mistakes.append(
                    f"{field} {address} can be reached from other machines, and Triton has neither a login nor TLS "
                    "on HTTP: whoever reaches it may use, read and overload it; fix: stay on "
                    f"{LOOPBACK} behind a proxy, or say that you mean it (--expose-without-login-or-tls)"
                )
        ports = [self.grpc_port, self.http_port, self.metrics_port]
        for (interface, flag), port in zip(PORT_FLAGS.items(), ports, strict=True):
            if not 0 < port <= _LARGEST_PORT:
                mistakes.append(f"{interface} port {port} is outside 1..{_LARGEST_PORT}; change {flag}")
        if len(set(ports)) < len(ports):
            mistakes.append(f"ports {', '.join(map(str, ports))} must differ; change {', '.join(PORT_FLAGS.values())}")
        for field in ("log_verbose", "exit_seconds"):
            if getattr(self, field) < 0:
                mistakes.append(f"{field} is {getattr(self, field)}; it must be at least 0")
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @property
    def restricted(self) -> tuple[str, ...]:
        """Triton's names of the interfaces that take the key."""
        return (*_ADMIN_APIS, "statistics") if self.exposed else _ADMIN_APIS


def server_flags(settings: ServerSettings, key: str) -> list[str]:
    """The arguments of ``tritonserver``, every one as ``--name`` or ``--name=value``.

    Args:
        settings: what is served, and to whom.
        key: what a request to a restricted interface must carry; letters, digits and ``$(){}_-`` (a container
            engine's reference to a secret) alone, as Triton splits its flags at other signs.

    Raises:
        ConfigError: the key is empty or has other signs in it.
    """
    if not key or not all(sign.isascii() and (sign.isalnum() or sign in "$(){}_-") for sign in key):
        raise ConfigError("the key of the restricted interfaces must be letters and digits, at least one")
    restricted = f"{','.join(settings.restricted)}:{KEY_HEADER}={key}"
    flags: dict[str, object] = {
        "model-repository": settings.repository,
        "model-control-mode": "explicit" if settings.reload else "none",
        # a version that is being loaded, or was refused, would make the whole server unready while the other answers
        "strict-readiness": str(not settings.reload).lower(),
        "exit-on-error": "true",
        "exit-timeout-secs": settings.exit_seconds,
        "allow-gpu-metrics": str(settings.gpu_metrics).lower(),
        "http-restricted-api": restricted,
        "grpc-restricted-protocol": restricted,
        "grpc-address": settings.host,
        "grpc-port": settings.grpc_port,
        "http-address": settings.host,
        "http-port": settings.http_port,
        "metrics-address": settings.metrics_host,
        "metrics-port": settings.metrics_port,
    }
    if settings.reload:
        flags["load-model"] = "*"  # all at the start; later ones by name
    if settings.log_verbose:
        flags["log-verbose"] = settings.log_verbose
    if settings.backends is not None:
        flags["backend-directory"] = settings.backends
    if settings.caches is not None:
        flags["cache-directory"] = settings.caches
    if settings.python_memory_prefix is not None:
        flags["backend-config"] = f"python,shm-region-prefix-name={settings.python_memory_prefix}"
    return ["--disable-auto-complete-config", *(f"--{name}={value}" for name, value in flags.items())]
