"""An InferenceService for KServe, in place of Deployment, Service and ScaledObject: KServe makes those.

KServe's gateway ends TLS there, so Triton listens on the pod's address, and the network policy lets in the gateway's
namespace alone.
"""

from __future__ import annotations

from typing import Any

from rekd_deploy.production.container import (
    ANY_ADDRESS,
    EXIT_SECONDS,
    Listening,
    pod_rights,
    probes,
    server_container,
    server_volumes,
)
from rekd_deploy.production.kubernetes import METRICS, Manifest, labels, namespace, pod_monitor
from rekd_deploy.production.queue_time import scaling_query
from rekd_deploy.production.settings import UNPUBLISH_SECONDS, ProductionSettings

_CONTAINER = "kserve-container"
"""KServe looks for the server under this name."""


def kserve_manifests(settings: ProductionSettings) -> dict[str, Manifest]:
    """The manifests by file name, to be applied in that order.

    Raises:
        ConfigError: the settings name no image of Triton.
    """
    return {
        "1-namespace.yaml": namespace(settings),
        "2-inferenceservice.yaml": _inference_service(settings),
        "3-networkpolicy.yaml": _network_policy(settings),
        "4-podmonitor.yaml": pod_monitor(settings),
    }


def _inference_service(settings: ProductionSettings) -> Manifest:
    server = server_container(settings, Listening(requests=ANY_ADDRESS))
    server["env"] = [*server["env"], {"name": "PROTOCOL", "value": "v2"}]  # read by KServe
    predictor = {
        "labels": labels(settings),
        "minReplicas": settings.min_replicas,
        "maxReplicas": settings.max_replicas,
        "timeout": settings.request_seconds,
        "autoScaling": {"metrics": [{"type": "External", "external": _queue_time(settings)}]},
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_rights(settings),
        "terminationGracePeriodSeconds": UNPUBLISH_SECONDS + EXIT_SECONDS + 5,
        "containers": [
            {
                "name": _CONTAINER,
                **server,
                "ports": [
                    {"name": "http1", "containerPort": settings.http_port, "protocol": "TCP"},
                    {"name": "grpc", "containerPort": settings.grpc_port, "protocol": "TCP"},
                    {"name": METRICS, "containerPort": settings.metrics_port, "protocol": "TCP"},
                ],
                **probes(settings.http_port, "HTTP"),
                "lifecycle": {"preStop": {"sleep": {"seconds": UNPUBLISH_SECONDS}}},
            }
        ],
        "volumes": server_volumes(settings),
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": settings.name,
            "namespace": settings.namespace,
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "keda",
            },
        },
        "spec": {"predictor": predictor},
    }


def _queue_time(settings: ProductionSettings) -> dict[str, Any]:
    """KServe hands ``value`` to KEDA as its threshold, which KEDA holds against the average over the replicas."""
    return {
        "metric": {
            "backend": "prometheus",
            "serverAddress": settings.prometheus_url,
            "query": scaling_query(settings),
        },
        "target": {"type": "Value", "value": f"{settings.queue_target_ms:g}"},
    }


def _network_policy(settings: ProductionSettings) -> Manifest:
    def from_namespace(name: str, *ports: int) -> dict[str, Any]:
        return {
            "ports": [{"port": port} for port in ports],
            "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}],
        }

    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": settings.name, "namespace": settings.namespace, "labels": labels(settings)},
        "spec": {
            "podSelector": {"matchLabels": labels(settings)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                from_namespace(settings.gateway_namespace, settings.http_port, settings.grpc_port),
                from_namespace(settings.monitoring_namespace, settings.metrics_port),
            ],
            "egress": [],
        },
    }
