"""The Grafana dashboard, as data: what clients see, where the time goes, how full the machine is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rekd_deploy.production.queue_time import ENTRANCES, mean_wait_ms
from rekd_deploy.production.settings import ProductionSettings
from rekd_deploy.repository.config import ENSEMBLE

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_INSTANCES = 'instance=~"$instance"'
_ASKED = 'model=~"$model"'
_STEPS = f'model=~"{ENSEMBLE}_.+", model!~"{ENTRANCES}"'
_WINDOW = "$__rate_interval"
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 8
"""Grafana's grid is 24 wide."""


@dataclass(frozen=True)
class Query:
    """One line of a panel."""

    expression: str
    """PromQL."""
    legend: str
    """Grafana's template of its name."""


@dataclass(frozen=True)
class Panel:
    """One graph over time."""

    title: str
    unit: str
    """Grafana's name of it."""
    queries: tuple[Query, ...]
    description: str = ""
    threshold: float | None = None
    """Where a line is drawn."""
    stacked: bool = False


def panels(settings: ProductionSettings) -> dict[str, list[Panel]]:
    """The graphs by the heading they stand under."""
    return {
        "What clients see": [
            Panel("Requests", "reqps", (Query(_sum("nv_inference_request_success", _ASKED, "model"), "{{model}}"),)),
            Panel(
                "Failed requests",
                "reqps",
                (Query(_sum("nv_inference_request_failure", _ASKED, "model, reason"), "{{model}} {{reason}}"),),
                "An ensemble counts a failure of one of its steps as OTHER.",
            ),
            Panel(
                "Latency",
                "ms",
                (
                    Query(_quantile("0.5"), "median, {{model}}"),
                    Query(_quantile("0.99"), "99 %, {{model}}"),
                    Query(_mean_ms("request", _ASKED), "mean, {{model}}"),
                ),
                "Inside the server. Medians and percentiles cannot be added up: the worst replica's are shown.",
            ),
        ],
        "Where the time goes": [
            Panel(
                "Wait of a request",
                "ms",
                (Query(mean_wait_ms(_INSTANCES), "all steps"),),
                "In the queues of all steps together. Above the line, replicas are added.",
                threshold=settings.queue_target_ms,
            ),
            Panel("Wait by step", "ms", (Query(_mean_ms("queue", _STEPS), "{{model}}"),), stacked=True),
            Panel("Requests waiting", "short", (Query(_gauge("nv_inference_pending_request_count"), "{{model}}"),)),
            Panel(
                "Computation by step",
                "ms",
                (Query(_mean_ms("compute_infer", _STEPS), "{{model}}"),),
                "Per request; a request that shared a batch counts the whole batch's time.",
                stacked=True,
            ),
            Panel(
                "Copies by step",
                "ms",
                (
                    Query(_mean_ms("compute_input", _STEPS), "in, {{model}}"),
                    Query(_mean_ms("compute_output", _STEPS), "out, {{model}}"),
                ),
                stacked=True,
            ),
            Panel(
                "Batch by step",
                "short",
                (
                    Query(
                        f"{_sum('nv_inference_count', _STEPS, 'model')} / "
                        f"{_sum('nv_inference_exec_count', _STEPS, 'model')}",
                        "{{model}}",
                    ),
                ),
                "Texts or images in one execution: what dynamic batching gains.",
            ),
        ],
        "The machine": [
            Panel("Processors", "percentunit", (Query(_plain("nv_cpu_utilization"), "{{instance}}"),)),
            Panel("GPUs", "percentunit", (Query(_plain("nv_gpu_utilization"), "{{instance}} {{gpu_uuid}}"),)),
            Panel(
                "Memory",
                "bytes",
                (
                    Query(_plain("nv_cpu_memory_used_bytes"), "{{instance}}"),
                    Query(_plain("nv_gpu_memory_used_bytes"), "{{instance}} {{gpu_uuid}}"),
                ),
            ),
        ],
    }


def dashboard(settings: ProductionSettings) -> dict[str, Any]:
    """Grafana's document."""
    drawn: list[dict[str, Any]] = []
    top = 0
    for heading, group in panels(settings).items():
        place = {"x": 0, "y": top, "w": _COLUMNS * _WIDTH, "h": 1}
        drawn.append({"id": len(drawn) + 1, "type": "row", "title": heading, "collapsed": False, "gridPos": place,
                      "panels": []})  # fmt: skip
        top += 1
        for number, panel in enumerate(group):
            row, column = divmod(number, _COLUMNS)
            place = {"x": column * _WIDTH, "y": top + row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            drawn.append({"id": len(drawn) + 1, "gridPos": place, **_graph(panel)})
        top += -(-len(group) // _COLUMNS) * _HEIGHT
    return {
        "uid": settings.name,
        "title": "REKD on Triton",
        "tags": ["rekd", "triton"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "panels": drawn,
    }


def _graph(panel: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 10}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": custom}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    if panel.threshold is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.threshold}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        custom["thresholdsStyle"] = {"mode": "line"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": query.expression, "legendFormat": query.legend,
             "datasource": DATASOURCE}
            for number, query in enumerate(panel.queries)
        ],
    }  # fmt: skip


def _variables() -> list[dict[str, Any]]:
    def values(name: str, label: str, query: str) -> dict[str, Any]:
        return {
            "name": name, "label": label, "type": "query", "datasource": DATASOURCE, "query": query, "refresh": 2,
            "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
        }  # fmt: skip

    asked = f'nv_inference_request_success{{model=~"{ENTRANCES}"}}'
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {**values("model", "Model", f"label_values({asked}, model)"), "allValue": ENTRANCES},
        values("instance", "Replica", "label_values(nv_inference_request_success, instance)"),
    ]


def _sum(metric: str, models: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{models}, {_INSTANCES}}}[{_WINDOW}]))"


def _mean_ms(part: str, models: str) -> str:
    """Milliseconds of one request in one part of the way."""
    took = _sum(f"nv_inference_{part}_duration_us", models, "model")
    return f"{took} / {_sum('nv_inference_request_success', models, 'model')} / 1000"


def _quantile(quantile: str) -> str:
    labels = f'{_ASKED}, {_INSTANCES}, quantile="{quantile}"'
    return f"max by (model) (nv_inference_request_summary_us{{{labels}}}) / 1000"


def _gauge(metric: str) -> str:
    return f"sum by (model) ({metric}{{{_STEPS}, {_INSTANCES}}})"


def _plain(metric: str) -> str:
    return f"{metric}{{{_INSTANCES}}}"
