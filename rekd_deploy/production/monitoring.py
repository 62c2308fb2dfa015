"""Prometheus and Grafana beside the containers of a compose file: what to scrape, where the dashboard is."""

from __future__ import annotations

from typing import Any

from rekd_deploy.production.settings import ProductionSettings

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
DASHBOARD_FOLDER = "/etc/grafana/dashboards"
_INTERVAL = "15s"


def compose_files(settings: ProductionSettings, target: str) -> dict[str, Any]:
    """Documents by file name.

    Args:
        target: HOST:PORT of the server's metrics as Prometheus sees it.
    """
    return {
        "prometheus.yml": {
            "global": {"scrape_interval": _INTERVAL, "evaluation_interval": _INTERVAL},
            "scrape_configs": [{"job_name": settings.name, "static_configs": [{"targets": [target]}]}],
        },
        "grafana/datasource.yaml": {
            "apiVersion": 1,
            "datasources": [
                {
                    "name": "Prometheus",
                    "type": "prometheus",
                    "access": "proxy",
                    "url": f"http://prometheus:{PROMETHEUS_PORT}",
                    "isDefault": True,
                    "jsonData": {"timeInterval": _INTERVAL},
                }
            ],
        },
        "grafana/dashboards.yaml": {
            "apiVersion": 1,
            "providers": [{"name": settings.name, "type": "file", "options": {"path": DASHBOARD_FOLDER}}],
        },
    }
