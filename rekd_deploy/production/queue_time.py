"""How long requests wait: the measure that replicas are added by, as Prometheus computes it from Triton's counters.

The wait of a request is what all members took together; the ensemble's own counter does not hold it. KEDA divides what
the query gives by the number of replicas, so the query multiplies by it: then a wait of twice the target doubles them.
"""

from __future__ import annotations

from rekd_deploy.production.settings import ProductionSettings
from rekd_deploy.repository.config import ENSEMBLE, SINGLE
from rekd_deploy.repository.text_endpoint import RAW

ENTRANCES = "|".join((ENSEMBLE, SINGLE, *RAW.values()))
"""Models that clients ask, as a regular expression; the others are their steps."""
WINDOW = "1m"
_NO_TRAFFIC = 0.001
"""Requests a second below which the wait counts as none, rather than as nought by nought."""


def mean_wait_ms(labels: str = "") -> str:
    """PromQL: mean wait of a request, all steps together, in milliseconds.

    Args:
        labels: more conditions on the series, such as ``namespace="rekd"``.
    """
    waited = _rate("nv_inference_queue_duration_us", f'model=~"{ENSEMBLE}.*"', labels)
    requests = _rate("nv_inference_request_success", f'model=~"{ENTRANCES}"', labels)
    return f"{waited} / clamp_min({requests}, {_NO_TRAFFIC}) / 1000"


def scaling_query(settings: ProductionSettings) -> str:
    """PromQL: the mean wait times the number of replicas."""
    labels = f'namespace="{settings.namespace}"'
    replicas = f'count(sum by (instance) (nv_inference_request_success{{model="{ENSEMBLE}", {labels}}}))'
    return f"{mean_wait_ms(labels)} * {replicas}"


def _rate(metric: str, *conditions: str) -> str:
    return f"sum(rate({metric}{{{', '.join(filter(None, conditions))}}}[{WINDOW}]))"
