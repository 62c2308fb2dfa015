"""The Triton container, whoever runs it: its command, its user's rights, what it mounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rekd_deploy.production.settings import ProductionSettings
from rekd_deploy.server.flags import LOOPBACK, ServerSettings, server_flags

ANY_ADDRESS = "0.0.0.0"
KEY_VARIABLE = "REKD_ADMIN_KEY"
"""Environment variable with the key of the restricted interfaces."""
EXIT_SECONDS = 10
"""How long the server may take for the requests under way when it is told to end."""
LIVE, READY = "/v2/health/live", "/v2/health/ready"


@dataclass(frozen=True)
class Listening:
    """Where the server inside a container listens."""

    requests: str = LOOPBACK
    """Address for gRPC and HTTP; loopback: a proxy in the same pod alone reaches it."""
    metrics: str = ANY_ADDRESS
    """Address for the metrics, which Prometheus must reach."""


def command(settings: ProductionSettings, listening: Listening, key: str) -> list[str]:
    """``tritonserver`` with its arguments; the image's own entrypoint stays before it.

    Args:
        key: the container engine's reference to the key, such as ``$(REKD_ADMIN_KEY)``.
    """
    server = ServerSettings(
        repository=settings.repository,
        host=listening.requests,
        metrics_host=listening.metrics,
        grpc_port=settings.grpc_port,
        http_port=settings.http_port,
        metrics_port=settings.metrics_port,
        exposed={listening.requests, listening.metrics} != {LOOPBACK},
        gpu_metrics=settings.gpus > 0,
        exit_seconds=EXIT_SECONDS,
    )
    return ["tritonserver", *server_flags(server, key), "--metrics-config=summary_latencies=true"]


def pod_rights(settings: ProductionSettings) -> dict[str, Any]:
    """``securityContext`` of a pod, as the cluster's profile 'restricted' asks for."""
    return {
        "runAsNonRoot": True,
        "runAsUser": settings.user,
        "runAsGroup": settings.user,
        "fsGroup": settings.user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_rights() -> dict[str, Any]:
    """``securityContext`` of a container: no capability, nothing writable but what is mounted."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def server_container(settings: ProductionSettings, listening: Listening) -> dict[str, Any]:
    """The container of a pod, without ports and probes."""
    resources = {"cpu": _number(settings.cpus), "memory": f"{round(settings.memory_gib * 1024)}Mi"}
    if settings.gpus:
        resources["nvidia.com/gpu"] = str(settings.gpus)
    return {
        "image": settings.required_image(),
        "args": command(settings, listening, f"$({KEY_VARIABLE})"),
        "env": [
            {"name": KEY_VARIABLE, "valueFrom": {"secretKeyRef": {"name": settings.key_secret, "key": "key"}}},
        ],
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": container_rights(),
        "volumeMounts": [
            {"name": "models", "mountPath": settings.models_folder, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "temporary", "mountPath": "/tmp"},
        ],
    }


def server_volumes(settings: ProductionSettings) -> list[dict[str, Any]]:
    """What ``server_container`` mounts."""
    return [
        {"name": "models", "persistentVolumeClaim": {"claimName": settings.models_claim, "readOnly": True}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{settings.shared_memory_mib}Mi"}},
        {"name": "temporary", "emptyDir": {}},
    ]


def probes(port: int, scheme: str) -> dict[str, Any]:
    """Alive: the server answers. Ready: every model is loaded. Until it has been ready, nothing else is asked."""

    def ask(path: str, seconds: int, failures: int) -> dict[str, Any]:
        return {
            "httpGet": {"path": path, "port": port, "scheme": scheme},
            "periodSeconds": seconds,
            "timeoutSeconds": 5,
            "failureThreshold": failures,
        }

    return {
        "startupProbe": ask(READY, seconds=5, failures=60),
        "readinessProbe": ask(READY, seconds=5, failures=2),
        "livenessProbe": ask(LIVE, seconds=10, failures=6),
    }


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{round(value * 1000)}m"
