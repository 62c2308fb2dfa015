"""The safe flags of a Triton server, and its ports.

``rekd-serve`` starts its server with them, and the files in ``deploy/`` have the same, which a test holds: a server is
closed in the same ways wherever it runs.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

from rekd_deploy.errors import ServerError
from rekd_train.errors import ConfigError

LOOPBACK = "127.0.0.1"
KEY_HEADER = "rekd-admin"
"""HTTP header that carries the key of the restricted interfaces."""
GRPC_KEY_HEADER = f"triton-grpc-protocol-{KEY_HEADER}"
"""The same in gRPC's metadata, where Triton puts a prefix before it."""
_ADMIN_APIS = "model-repository,shared-memory,trace,logging"
"""What no client needs. Not model-config: clients read labels and preprocessing from it."""


def server_flags(
    repositories: Sequence[str], ports: Mapping[str, int], key: str, *, host: str = LOOPBACK, exposed: bool = False,
    reload: bool = False, gpu_metrics: bool = False, log_verbose: int = 0, exit_seconds: int = 5,
    backends: str | None = None, memory_prefix: str | None = None,
) -> list[str]:  # fmt: skip
    """The arguments of ``tritonserver``, every one as ``--name`` or ``--name=value``.

    Args:
        repositories: paths of the model repositories, as the server sees them.
        ports: of 'grpc', 'http' and 'metrics'; the metrics stay on loopback.
        key: what a request to a restricted interface must carry.
        host: IPv4 address for gRPC and HTTP.
        exposed: see ``check_host``; then the statistics take the key, too.
        reload: whether models may be loaded while it runs, by those who have the key. Then the server's own readiness
            does not speak for its models: probe /v2/models/rekd/ready.
        log_verbose: from 1 on, each request's id and way through the models are logged.
        exit_seconds: how long requests in flight may take when the server is told to end.
        backends: folder of the backends; None: where Triton looks by itself.
        memory_prefix: how the names of the python backend's shared memory begin; None: Triton's choice.
    """
    restricted = f"{_ADMIN_APIS}{',statistics' if exposed else ''}:{KEY_HEADER}={key}"
    flags: dict[str, object] = {
        "model-control-mode": "explicit" if reload else "none",
        # a version that is being loaded, or was refused, would make the whole server unready while the other answers
        "strict-readiness": str(not reload).lower(),
        "exit-on-error": "true",
        "exit-timeout-secs": exit_seconds,
        "allow-gpu-metrics": str(gpu_metrics).lower(),
        "http-restricted-api": restricted,
        "grpc-restricted-protocol": restricted,
        "grpc-address": host,
        "grpc-port": ports["grpc"],
        "http-address": host,
        "http-port": ports["http"],
        "metrics-address": LOOPBACK,
        "metrics-port": ports["metrics"],
    }
    if reload:
        flags["load-model"] = "*"  # all at the start; later ones by name
    if log_verbose:
        flags["log-verbose"] = log_verbose
    if backends is not None:
        flags["backend-directory"] = backends
    if memory_prefix is not None:
        flags["backend-config"] = f"python,shm-region-prefix-name={memory_prefix}"
    given = [*(("model-repository", repository) for repository in repositories), *flags.items()]
    return ["--disable-auto-complete-config", *(f"--{name}={value}" for name, value in given)]


def check_host(host: str, exposed: bool) -> None:
    """Raise ConfigError unless ``host`` is an IPv4 address on loopback, or it is said that another is meant.

    Triton has no login, and no TLS on HTTP: another address takes a closed network or a proxy before it.
    """
    try:
        loopback = ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        raise ConfigError(f"host '{host}' is no IPv4 address; give one like {LOOPBACK}") from None
    if not loopback and not exposed:
        raise ConfigError(
            f"host {host} can be reached from other machines, and Triton has neither a login nor TLS on HTTP: whoever "
            f"reaches it may use, read and overload it; fix: stay on {LOOPBACK} behind a proxy, or say that you mean "
            "it (--expose-without-login-or-tls)"
        )


def settled_ports(wanted: Mapping[str, int], host: str = LOOPBACK) -> dict[str, int]:
    """The ports to use by interface ('grpc', 'http', 'metrics'): free ones for 0, the others checked.

    Raises:
        ServerError: names every port that is taken and the flag that changes it.
    """
    mistakes, ports = [], {}
    with ExitStack() as held:
        for interface, port in wanted.items():
            listener = held.enter_context(closing(socket.socket()))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton: an old connection may linger
            try:
                listener.bind((LOOPBACK if interface == "metrics" else host, port))
                listener.listen(1)
            except (OSError, OverflowError) as error:
                mistakes.append(
                    f"port {port} cannot be used ({getattr(error, 'strerror', error)}); choose another with "
                    f"--{interface}-port (0: any free)"
                )
            else:
                ports[interface] = listener.getsockname()[1]
    if mistakes:
        raise ServerError("; ".join(mistakes))
    return ports
