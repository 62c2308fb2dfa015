"""What a running server says about itself."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import trustme
from proxies import Proxy, server_context

from rekd_deploy.client.connection import TlsSettings
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import ClientError, DeadlineError, InsecureServerError, ServerUnavailableError
from rekd_deploy.server.status import ServerState, ServerStatus, StepTotals, read_status, status_table

ENTRY = {
    "name": "rekd_selector", "version": "3", "inference_count": "40", "execution_count": "10",
    "inference_stats": {
        "success": {"count": "20", "ns": "60000000"}, "fail": {"count": "2", "ns": "5"},
        "queue": {"count": "20", "ns": "10000000"}, "compute_input": {"count": "20", "ns": "2000000"},
        "compute_infer": {"count": "20", "ns": "46000000"}, "compute_output": {"count": "20", "ns": "1000000"},
    },
}  # fmt: skip
STEP = StepTotals.of(ENTRY)
STATE = ServerState(
    7, "/models", "127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3/metrics", "/log", "secret", 3
)


def shown(status):
    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    console.print(*status.lines(), status_table(status), sep="\n")
    return console.export_text()


def test_counts_and_means_of_a_step():
    assert STEP.to_dict() == {
        "model": "rekd_selector", "version": 3, "requests": 20, "failed": 2, "rows": 40, "executions": 10,
        "request_ms": 3.0, "queue_ms": 0.5, "input_ms": 0.1, "compute_ms": 2.3, "output_ms": 0.05,
        "other_ms": pytest.approx(0.05),
    }  # fmt: skip


def test_a_step_without_requests():
    """Over gRPC, numbers that are zero are left out."""
    step = StepTotals.of({"name": "rekd", "version": "1", "inference_stats": {}})
    assert (step.requests, step.rows, step.to_dict()["request_ms"], step.to_dict()["other_ms"]) == (0, 0, None, None)
    assert " - " in shown(ServerStatus("u", True, "2.51.0", (step,)))


def test_table_and_document():
    ensemble = replace(STEP, model="rekd", requests=1200)
    status = ServerStatus("http://127.0.0.1:2", True, "2.51.0", (ensemble, STEP), STATE)
    text = shown(status)
    for part in ("ready, Triton 2.51.0, version 3", "/models (process 7)", "1,200", "4.0", "2.300", "rekd_selector"):
        assert part in text
    assert "the queues of its steps" in " ".join(text.split())
    assert "secret" not in text and "secret" not in json.dumps(status.to_dict())
    assert status.to_dict()["versions"] == [3] and status.to_dict()["steps"][1]["compute_ms"] == 2.3
    assert "started again 2 times" in shown(replace(status, running=replace(STATE, restarts=2)))
    assert "live, not ready" in shown(replace(status, ready=False))


def test_the_table_fits_80_columns():
    from rich.console import Console

    names = ("rekd", "rekd_answer", "rekd_predictor", "rekd_prepare", "rekd_selector", "rekd_single", "rekd_text")
    spent = {**STEP.nanoseconds, "request": 1_234_567 * 1_234_567_800}
    busy = replace(STEP, version=12, requests=1_234_567, failed=89_012, nanoseconds=spent)
    console = Console(width=80, file=io.StringIO())
    console.print(status_table(ServerStatus("u", True, "2.51.0", tuple(replace(busy, model=name) for name in names))))
    lines = console.file.getvalue().splitlines()
    assert "…" not in "".join(lines) and max(map(len, lines)) <= 80
    assert lines[0].split() == "model, version requests failed batch total queue input compute output other".split()
    assert [line.split()[:7] for line in lines[2:9]] == [
        [name, "12", "1.2", "M", "89,012", "4.0", "1235."] for name in names
    ]


def test_without_an_address_there_must_be_one_server():
    with pytest.raises(ServerUnavailableError, match="no rekd-serve of yours is running here; fix: start one"):
        read_status(None)
    with pytest.raises(ServerUnavailableError, match="not one server, but http://127.0.0.1:2, http://127.0.0.1:9"):
        read_status(None, [STATE, replace(STATE, http_url="http://127.0.0.1:9")])


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_nothing_there_and_no_response_in_time(form):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = form.format(listener.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="within 0.5 s"):
            read_status(url, timeout=0.5)
        assert time.monotonic() - began < 3.0
    with pytest.raises(ServerUnavailableError, match="no Triton server answers"):
        read_status(url, timeout=2.0)


def test_what_is_no_address():
    with pytest.raises(ClientError, match="is no address"):
        read_status("ftp://host:1")


# the real server


@pytest.mark.triton
@pytest.mark.parametrize("attribute", ["grpc_url", "http_url"])
def test_requests_are_counted_step_by_step(server, attribute):
    def counted():
        status = read_status(getattr(server, attribute))
        assert status.ready and status.versions == [1] and status.triton
        return {step.model: step for step in status.steps}

    before = counted()
    assert set(before) == {"rekd", "rekd_selector", "rekd_predictor"}
    ids = np.array([[2, 9, 10, 3]] * 3, dtype=np.int64)
    outputs = ("mask", "probabilities")  # of both steps: Triton leaves out a step whose outputs nobody requests
    with closing(open_transport(server.grpc_url, 10.0)) as transport:
        for _ in range(5):
            transport.submit("rekd", {"input_ids": ids, "attention_mask": np.ones_like(ids)}, outputs).result()
    after = counted()
    for model in before:
        assert after[model].requests - before[model].requests == 5
        assert after[model].rows - before[model].rows == 15
    means = after["rekd_selector"].to_dict()
    parts = sum(means[f"{name}_ms"] for name in ("queue", "input", "compute", "output", "other"))
    assert 0 < means["compute_ms"] < means["request_ms"] and parts == pytest.approx(means["request_ms"])


@pytest.mark.triton
@pytest.mark.parametrize("attribute", ["grpc_url", "http_url"])
def test_over_tls(server, attribute, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "roots.pem")
    url = getattr(server, attribute)
    with Proxy(int(url.rpartition(":")[2]), server_context(authority)) as proxy:
        secure = f"{'https' if 'http' in url else 'grpcs'}://127.0.0.1:{proxy.port}"
        assert read_status(secure, tls=TlsSettings(tmp_path / "roots.pem")).ready
        with pytest.raises(InsecureServerError, match="no trusted TLS connection"):
            read_status(secure)
        with pytest.raises(ServerUnavailableError, match="with TLS grpcs:// or https://$"):
            read_status(secure.replace("https", "http").replace("grpcs", "grpc"), timeout=3.0)


@pytest.mark.triton
def test_the_command(server, tmp_path):
    def show(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "rekd_deploy.cli.serve", "--status", *arguments],
            capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "160"},
        )  # fmt: skip

    done = show(server.http_url, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ready"] is document["live"] is True
    assert {step["model"] for step in document["steps"]} >= {"rekd", "rekd_predictor"}
    done = show(server.grpc_url)
    assert done.returncode == 0 and "ready, Triton" in done.stdout and "rekd_selector" in done.stdout
