"""Manifests for a cluster: in each pod Triton on loopback and nginx before it; replicas by how long requests wait."""

from __future__ import annotations

import hashlib
from typing import Any

from rekd_deploy.production.container import (
    EXIT_SECONDS,
    Listening,
    container_rights,
    pod_rights,
    probes,
    server_container,
    server_volumes,
)
from rekd_deploy.production.proxy import CONFIG_FILE, CONFIG_FOLDER, TLS_FOLDER, nginx_command, nginx_config
from rekd_deploy.production.queue_time import scaling_query
from rekd_deploy.production.settings import DRAIN_SECONDS, UNPUBLISH_SECONDS, ProductionSettings
from rekd_deploy.server.flags import LOOPBACK

Manifest = dict[str, Any]
METRICS = "metrics"
"""Name of the port with the metrics."""
POLL_SECONDS = 15
_SHRINK_SECONDS = 300
"""How long the wait must have been short before replicas go."""


def kubernetes_manifests(settings: ProductionSettings) -> dict[str, Manifest]:
    """The manifests by file name, to be applied in that order.

    Raises:
        ConfigError: the settings name no image of Triton.
    """
    config = nginx_config(settings, LOOPBACK)
    manifests = {
        "namespace.yaml": namespace(settings),
        "proxy.yaml": _object(settings, "v1", "ConfigMap", "-proxy", data={CONFIG_FILE: config}),
        "deployment.yaml": _deployment(settings, config),
        "service.yaml": _service(settings),
        "networkpolicy.yaml": _network_policy(settings),
        "poddisruptionbudget.yaml": _disruption_budget(settings),
        "scaledobject.yaml": _scaled_object(settings),
        "podmonitor.yaml": pod_monitor(settings),
    }
    return {f"{number}-{name}": each for number, (name, each) in enumerate(manifests.items(), start=1)}


def namespace(settings: ProductionSettings) -> Manifest:
    """The namespace; a pod that asks for more than the profile 'restricted' allows is refused there."""
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": settings.namespace,
            "labels": {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")},
        },
    }


def labels(settings: ProductionSettings) -> dict[str, str]:
    """What the pods are found by."""
    return {"app.kubernetes.io/name": settings.name, "app.kubernetes.io/component": "server"}


def pod_monitor(settings: ProductionSettings) -> Manifest:
    """Tells the Prometheus operator where the metrics are."""
    return _object(
        settings,
        "monitoring.coreos.com/v1",
        "PodMonitor",
        spec={
            "selector": {"matchLabels": labels(settings)},
            "podMetricsEndpoints": [{"port": METRICS, "path": "/metrics", "interval": f"{POLL_SECONDS}s"}],
        },
    )


def _deployment(settings: ProductionSettings, proxy_config: str) -> Manifest:
    pod = {
        "serviceAccountName": "default",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_rights(settings),
        "terminationGracePeriodSeconds": UNPUBLISH_SECONDS + DRAIN_SECONDS + EXIT_SECONDS + 5,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels(settings)},
            }
        ],
        "containers": [_server(settings), _proxy(settings)],
        "volumes": [
            *server_volumes(settings),
            {"name": "proxy-config", "configMap": {"name": f"{settings.name}-proxy"}},
            {"name": "proxy-temporary", "emptyDir": {}},
            {"name": "tls", "secret": {"secretName": settings.tls_secret, "defaultMode": 0o440}},
        ],
    }
    changed = {"rekd/proxy-config": hashlib.sha256(proxy_config.encode()).hexdigest()}  # new pods for a new one
    spec = {
        # no replicas: the autoscaler says how many, and applying the file again must not undo it
        "revisionHistoryLimit": 3,
        "selector": {"matchLabels": labels(settings)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {"metadata": {"labels": labels(settings), "annotations": changed}, "spec": pod},
    }
    return _object(settings, "apps/v1", "Deployment", spec=spec)


def _server(settings: ProductionSettings) -> Manifest:
    return {
        "name": "triton",
        **server_container(settings, Listening()),
        "ports": [{"name": METRICS, "containerPort": settings.metrics_port}],
        **probes(settings.tls_port, "HTTPS"),  # through the proxy: the server itself listens on loopback
        "lifecycle": _sleep(UNPUBLISH_SECONDS + DRAIN_SECONDS),
    }


def _proxy(settings: ProductionSettings) -> Manifest:
    return {
        "name": "proxy",
        "image": settings.proxy_image,
        "command": nginx_command(),
        "ports": [{"name": "https", "containerPort": settings.tls_port}],
        "resources": {
            "requests": {"cpu": "100m", "memory": "64Mi"},
            "limits": {"memory": f"{128 + settings.max_request_mib}Mi"},
        },
        "securityContext": container_rights(),
        "volumeMounts": [
            {"name": "proxy-config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "tls", "mountPath": TLS_FOLDER, "readOnly": True},
            {"name": "proxy-temporary", "mountPath": "/tmp"},
        ],
        "readinessProbe": {"tcpSocket": {"port": settings.tls_port}, "periodSeconds": 5},
        "livenessProbe": {"tcpSocket": {"port": settings.tls_port}, "periodSeconds": 10},
        "lifecycle": _sleep(UNPUBLISH_SECONDS),  # then nginx's image asks for SIGQUIT: finish what is under way
    }


def _service(settings: ProductionSettings) -> Manifest:
    port = {"name": "https", "port": settings.published_port, "targetPort": "https", "appProtocol": "https"}
    return _object(settings, "v1", "Service", spec={"selector": labels(settings), "ports": [port]})


def _network_policy(settings: ProductionSettings) -> Manifest:
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.monitoring_namespace}}}
    spec = {
        "podSelector": {"matchLabels": labels(settings)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"ports": [{"port": settings.tls_port}]},
            {"ports": [{"port": settings.metrics_port}], "from": [monitoring]},
        ],
        "egress": [],  # the server asks no one
    }
    return _object(settings, "networking.k8s.io/v1", "NetworkPolicy", spec=spec)


def _disruption_budget(settings: ProductionSettings) -> Manifest:
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": labels(settings)}}
    return _object(settings, "policy/v1", "PodDisruptionBudget", spec=spec)


def _scaled_object(settings: ProductionSettings) -> Manifest:
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": settings.name},
        "minReplicaCount": settings.min_replicas,
        "maxReplicaCount": settings.max_replicas,
        "pollingInterval": POLL_SECONDS,
        "fallback": {"failureThreshold": 4, "replicas": settings.min_replicas, "behavior": "currentReplicasIfHigher"},
        "advanced": {
            "horizontalPodAutoscalerConfig": {
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": _SHRINK_SECONDS}},
            }
        },
        "triggers": [
            {
                "type": "prometheus",
                "name": "queue-time",
                "metricType": "AverageValue",
                "metadata": {
                    "serverAddress": settings.prometheus_url,
                    "query": scaling_query(settings),
                    "threshold": f"{settings.queue_target_ms:g}",
                },
            }
        ],
    }
    return _object(settings, "keda.sh/v1alpha1", "ScaledObject", spec=spec)


def _object(settings: ProductionSettings, version: str, kind: str, suffix: str = "", **content: Any) -> Manifest:
    metadata = {"name": settings.name + suffix, "namespace": settings.namespace, "labels": labels(settings)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def _sleep(seconds: int) -> Manifest:
    return {"preStop": {"sleep": {"seconds": seconds}}}
