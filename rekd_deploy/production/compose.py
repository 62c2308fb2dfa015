"""A compose file for one machine: Triton in a closed network, nginx before it, Prometheus and Grafana on demand."""

from __future__ import annotations

from typing import Any

from rekd_deploy.production.container import ANY_ADDRESS, KEY_VARIABLE, READY, Listening, command
from rekd_deploy.production.monitoring import DASHBOARD_FOLDER, GRAFANA_PORT, PROMETHEUS_PORT, compose_files
from rekd_deploy.production.proxy import CONFIG_FILE, CONFIG_FOLDER, ProxyPaths, nginx_command, nginx_config
from rekd_deploy.production.settings import DRAIN_SECONDS, OLDEST_RELEASE, ProductionSettings

IMAGE_VARIABLE = "TRITON_IMAGE"
SERVER = "triton"
_INSIDE, _OUTSIDE = "inside", "outside"
_MONITORING = ["monitoring"]
_STOP_SECONDS = 30
_ASK_READY = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=2)"
"""The images of release YY.MM-py3 have Python, and no promise of curl."""


def compose_documents(settings: ProductionSettings) -> dict[str, Any]:
    """What lies beside the compose file and itself: documents, or text where it is no YAML, by file name."""
    return {
        "compose.yaml": _compose(settings),
        CONFIG_FILE: nginx_config(settings, settings.server_address, ProxyPaths(**_secret_paths())),
        **compose_files(settings, f"{SERVER}:{settings.metrics_port}"),
    }


def _compose(settings: ProductionSettings) -> dict[str, Any]:
    return {
        "name": settings.name,
        "services": {
            SERVER: _server(settings),
            "proxy": _proxy(settings),
            "prometheus": _prometheus(settings),
            "grafana": _grafana(settings),
        },
        "networks": {
            _INSIDE: {"internal": True, "ipam": {"config": [{"subnet": settings.subnet}]}},
            _OUTSIDE: {},
        },
        "volumes": {"prometheus": {}, "grafana": {}},
        "secrets": {
            "tls.crt": {"file": _required("TLS_CERTIFICATE", "the certificate's file")},
            "tls.key": {"file": _required("TLS_KEY", "the file of its key")},
        },
    }


def _server(settings: ProductionSettings) -> dict[str, Any]:
    year, month = OLDEST_RELEASE
    reservations: dict[str, Any] = {}
    if settings.gpus:
        gpus = {"driver": "nvidia", "count": settings.gpus, "capabilities": ["gpu"]}
        reservations = {"reservations": {"devices": [gpus]}}
    listening = Listening(requests=ANY_ADDRESS, metrics=ANY_ADDRESS)
    return {
        "image": _required(IMAGE_VARIABLE, f"a Triton image, release {year}.{month:02d} or later"),
        "command": command(settings, listening, f"${{{KEY_VARIABLE}}}"),
        "environment": {KEY_VARIABLE: _required(KEY_VARIABLE, "a long random word, letters and digits")},
        "user": f"{settings.user}:{settings.user}",
        **_closed(),
        "init": True,
        "shm_size": f"{settings.shared_memory_mib}m",
        "volumes": [
            {
                "type": "bind",
                "source": _required("REKD_MODELS", "the folder above the repository"),
                "target": settings.models_folder,
                "read_only": True,
                "bind": {"create_host_path": False},
            }
        ],
        "networks": {_INSIDE: {"ipv4_address": settings.server_address}},
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _ASK_READY, f"http://127.0.0.1:{settings.http_port}{READY}"],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": "300s",
            "start_interval": "2s",
        },
        "stop_grace_period": f"{_STOP_SECONDS}s",
        "deploy": {
            "resources": {
                "limits": {"cpus": f"{settings.cpus:g}", "memory": f"{round(settings.memory_gib * 1024)}m"},
                **reservations,
            }
        },
    }


def _proxy(settings: ProductionSettings) -> dict[str, Any]:
    return {
        "image": f"${{PROXY_IMAGE:-{settings.proxy_image}}}",
        "command": nginx_command(),
        "user": f"{settings.user}:{settings.user}",
        **_closed(),
        "stop_signal": "SIGQUIT",  # finish what is under way
        "stop_grace_period": f"{DRAIN_SECONDS + 5}s",
        "volumes": [_read_only(CONFIG_FILE, f"{CONFIG_FOLDER}/{CONFIG_FILE}")],
        "secrets": ["tls.crt", "tls.key"],
        "ports": [f"${{REKD_PORT:-{settings.published_port}}}:{settings.tls_port}"],
        "networks": [_INSIDE, _OUTSIDE],
        "depends_on": {SERVER: {"condition": "service_healthy"}},
    }


def _prometheus(settings: ProductionSettings) -> dict[str, Any]:
    return {
        "profiles": _MONITORING,
        "image": f"${{PROMETHEUS_IMAGE:-{settings.prometheus_image}}}",
        **_closed(),
        "volumes": [
            _read_only("prometheus.yml", "/etc/prometheus/prometheus.yml"),
            {"type": "volume", "source": "prometheus", "target": "/prometheus"},
        ],
        "networks": [_INSIDE, _OUTSIDE],
        "ports": [f"127.0.0.1:{PROMETHEUS_PORT}:{PROMETHEUS_PORT}"],
    }


def _grafana(settings: ProductionSettings) -> dict[str, Any]:
    return {
        "profiles": _MONITORING,
        "image": f"${{GRAFANA_IMAGE:-{settings.grafana_image}}}",
        **_closed(),
        "environment": {
            "GF_AUTH_ANONYMOUS_ENABLED": "true",  # to look, on this machine; no one can change anything
            "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
            "GF_AUTH_DISABLE_LOGIN_FORM": "true",
            "GF_AUTH_BASIC_ENABLED": "false",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        },
        "volumes": [
            _read_only("grafana/datasource.yaml", "/etc/grafana/provisioning/datasources/rekd.yaml"),
            _read_only("grafana/dashboards.yaml", "/etc/grafana/provisioning/dashboards/rekd.yaml"),
            _read_only("../grafana", DASHBOARD_FOLDER),
            {"type": "volume", "source": "grafana", "target": "/var/lib/grafana"},
        ],
        "networks": [_INSIDE, _OUTSIDE],
        "ports": [f"127.0.0.1:{GRAFANA_PORT}:{GRAFANA_PORT}"],
        "depends_on": ["prometheus"],
    }


def _closed() -> dict[str, Any]:
    """Every container: no capability, no new ones, nothing writable but what is mounted."""
    return {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": ["/tmp"],
        "restart": "unless-stopped",
    }


def _read_only(source: str, target: str) -> dict[str, Any]:
    return {"type": "bind", "source": f"./{source}", "target": target, "read_only": True}


def _required(variable: str, meaning: str) -> str:
    return f"${{{variable}:?set {variable} to {meaning}}}"


def _secret_paths() -> dict[str, str]:
    return {"certificate": "/run/secrets/tls.crt", "key": "/run/secrets/tls.key"}
