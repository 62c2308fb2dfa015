"""nginx before a Triton server: TLS for HTTP and gRPC on one port, and only what clients need.

Triton's HTTP has no TLS of its own, and its chunked bodies have been a way in; here a request is read whole, up to a
limit, before the server sees it. The interfaces that manage a server are not passed on at all, with a key or without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rekd_deploy.production.settings import DRAIN_SECONDS, ProductionSettings

CONFIG_FILE = "nginx.conf"
CONFIG_FOLDER = "/etc/rekd"
TLS_FOLDER = "/etc/rekd-tls"
_METHODS = (
    "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelInfer",
    "ModelStreamInfer",
)  # fmt: skip
_HTTP_PATHS = r"^/v2(/health/(live|ready)|/models/(?!stats$)[\w.-]+(/versions/\d+)?(/(infer|ready|config))?)?$"
_GRPC_PATHS = rf"^/(inference\.GRPCInferenceService/({'|'.join(_METHODS)})|grpc\.health\.v1\.Health/Check)$"
_CONNECTIONS = 64
"""To the server, kept open between requests."""
_CONNECTION_SECONDS, CONNECTION_REQUESTS = 300, 1000
"""After so long, or so many requests, a client's connection is renewed: new replicas get their share of clients."""
_LOG = (
    '{"time":"$time_iso8601","method":"$request_method","path":"$uri","status":$status,"seconds":$request_time,'
    '"bytes":$request_length,"tls":"$ssl_protocol","connection":$connection}'
)


@dataclass(frozen=True)
class ProxyPaths:
    """Where nginx finds and puts things; the defaults are those inside a container."""

    certificate: str = f"{TLS_FOLDER}/tls.crt"
    key: str = f"{TLS_FOLDER}/tls.key"
    temporary: str = "/tmp"
    access_log: str = "/dev/stdout"


def nginx_config(settings: ProductionSettings, server: str, paths: ProxyPaths | None = None) -> str:
    """The whole nginx.conf.

    Args:
        server: IPv4 address of the Triton server; its ports are the settings'.
        paths: files and folders on the machine that nginx runs on.
    """
    import crossplane

    paths = paths or ProxyPaths()
    patience = f"{settings.request_seconds}s"
    http = [
        _line("log_format", "json", "escape=json", _LOG),
        _line("access_log", paths.access_log, "json"),
        _line("server_tokens", "off"),
        *(_line(f"{name}_temp_path", f"{paths.temporary}/{name}") for name in
          ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")),
        _upstream("http", server, settings.http_port),
        _upstream("grpc", server, settings.grpc_port),
        _block("server", [], [
            _line("listen", str(settings.tls_port), "ssl"),
            _line("http2", "on"),
            _line("server_name", settings.hostname),
            _line("ssl_certificate", paths.certificate),
            _line("ssl_certificate_key", paths.key),
            _line("ssl_protocols", "TLSv1.2", "TLSv1.3"),
            _line("ssl_session_cache", "shared:tls:4m"),
            _line("keepalive_time", f"{_CONNECTION_SECONDS}s"),
            _line("keepalive_requests", str(CONNECTION_REQUESTS)),
            _line("client_max_body_size", f"{settings.max_request_mib}m"),
            _line("client_body_timeout", patience),
            _block("location", ["~", _HTTP_PATHS], [
                _line("proxy_pass", "http://http"),
                _line("proxy_http_version", "1.1"),
                _line("proxy_set_header", "Connection", ""),
                _line("proxy_set_header", "Host", "$host"),
                _line("proxy_read_timeout", patience),
                _line("proxy_next_upstream", "off"),
            ]),
            _block("location", ["~", _GRPC_PATHS], [
                _line("grpc_pass", "grpc://grpc"),
                _line("grpc_read_timeout", patience),
                _line("grpc_send_timeout", patience),
                _line("grpc_next_upstream", "off"),
            ]),
            _block("location", ["/"], [_line("return", "404")]),
        ]),
    ]  # fmt: skip
    document = [
        _line("daemon", "off"),
        _line("worker_processes", "auto"),
        _line("worker_shutdown_timeout", f"{DRAIN_SECONDS}s"),
        _line("pid", f"{paths.temporary}/nginx.pid"),
        _block("events", [], [_line("worker_connections", "4096")]),
        _block("http", [], http),
    ]
    return crossplane.build(document, indent=4).lstrip() + "\n"


def nginx_command(config: str = f"{CONFIG_FOLDER}/{CONFIG_FILE}") -> list[str]:
    """How nginx is started on it, with its errors on the standard error output."""
    return ["nginx", "-e", "stderr", "-c", config]


def _upstream(name: str, server: str, port: int) -> dict[str, Any]:
    return _block("upstream", [name], [_line("server", f"{server}:{port}"), _line("keepalive", str(_CONNECTIONS))])


def _line(directive: str, *arguments: str) -> dict[str, Any]:
    return {"directive": directive, "args": list(arguments)}


def _block(directive: str, arguments: list[str], lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {"directive": directive, "args": arguments, "block": lines}
