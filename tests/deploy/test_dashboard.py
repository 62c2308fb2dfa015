"""The Grafana dashboard: nothing overlaps, every query parses, the autoscaler's measure is what it says."""

from __future__ import annotations

import itertools
import json
import re

import promql_parser
import pytest

from rekd_deploy.production.dashboard import dashboard
from rekd_deploy.production.queue_time import ENTRANCES, scaling_query
from rekd_deploy.production.settings import ProductionSettings
from rekd_deploy.repository.config import ENSEMBLE, PREDICTOR, SELECTOR, SINGLE

SETTINGS = ProductionSettings(queue_target_ms=12.5)


@pytest.fixture(scope="module")
def document():
    return json.loads(json.dumps(dashboard(SETTINGS)))


@pytest.fixture(scope="module")
def graphs(document):
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def expressions(graphs) -> list[str]:
    return [target["expr"] for panel in graphs for target in panel["targets"]]


def test_panels_have_their_own_number_and_name(document):
    for field in ("id", "title"):
        values = [panel[field] for panel in document["panels"]]
        assert len(values) == len(set(values))


def test_panels_lie_within_the_grid_and_do_not_overlap(document):
    def cells(panel):
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["w"] > 0 and place["h"] > 0
        return set(itertools.product(range(place["x"], place["x"] + place["w"]),
                                     range(place["y"], place["y"] + place["h"])))  # fmt: skip

    taken: set = set()
    for panel in document["panels"]:
        assert not taken & cells(panel), panel["title"]
        taken |= cells(panel)


def test_the_source_of_data_is_a_variable(document, graphs):
    variables = {each["name"]: each for each in document["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for panel in graphs:
        for source in [panel["datasource"], *(target["datasource"] for target in panel["targets"])]:
            assert source == {"type": "prometheus", "uid": "${datasource}"}
    used = {name for text in expressions(graphs) for name in re.findall(r"\$(\w+)", text)} - {"__rate_interval"}
    assert used == set(variables) - {"datasource"}


def test_queries_parse(graphs):
    for text in [*expressions(graphs), scaling_query(SETTINGS)]:
        promql_parser.parse(text.replace("$__rate_interval", "1m"))
    for panel in graphs:
        names = [target["refId"] for target in panel["targets"]]
        assert names and len(names) == len(set(names))


def test_what_must_be_seen_is_there(graphs):
    everything = " ".join(expressions(graphs))
    for metric in (
        "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_queue_duration_us",
        "nv_inference_compute_infer_duration_us", "nv_inference_count", "nv_inference_exec_count",
        "nv_inference_request_summary_us", "nv_inference_pending_request_count", "nv_gpu_utilization",
    ):  # fmt: skip
        assert metric in everything
    assert 'quantile="0.5"' in everything and 'quantile="0.99"' in everything


def test_the_autoscalers_limit_is_drawn(graphs):
    [drawn] = [panel for panel in graphs if "thresholds" in panel["fieldConfig"]["defaults"]]
    assert drawn["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"] == SETTINGS.queue_target_ms
    assert "nv_inference_queue_duration_us" in drawn["targets"][0]["expr"]


def test_entrances_and_steps_are_told_apart(graphs):
    assert re.fullmatch(ENTRANCES, ENSEMBLE) and re.fullmatch(ENTRANCES, SINGLE)
    assert not re.fullmatch(ENTRANCES, SELECTOR) and not re.fullmatch(ENTRANCES, PREDICTOR)


def test_the_autoscaler_gets_the_wait_times_the_replicas():
    """It divides by the replicas, whatever the number; so that the wait itself is compared, the query multiplies."""
    query = promql_parser.parse(scaling_query(SETTINGS))
    assert str(query.op) == "*" and str(query.rhs.op) == "count"
    assert "nv_inference_queue_duration_us" in query.lhs.prettify()
