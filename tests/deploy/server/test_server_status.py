"""What a running server says about itself; of the real one: test_triton_server."""

import io
import json
import socket
import time
from dataclasses import replace

import pytest
from rich.console import Console

from rekd_deploy.errors import DeadlineError, ServerUnavailableError
from rekd_deploy.server.status import ServerState, ServerStatus, StepTotals, read_status, status_table

TIMES = {"success": (20, 60), "queue": (20, 10), "compute_input": (20, 2), "compute_infer": (20, 46)}
TIMES |= {"compute_output": (20, 1), "fail": (2, 1)}
ENTRY = {
    "name": "rekd_selector", "version": "3", "inference_count": "40", "execution_count": "10",
    "inference_stats": {key: {"count": str(n), "ns": str(ms * 1_000_000)} for key, (n, ms) in TIMES.items()},
}  # fmt: skip
STEP = StepTotals.of(ENTRY)
STATE = ServerState(7, "/models", "127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3/m", "/log", "secret", 3)


def shown(status):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(*status.lines(), status_table(status), sep="\n")
    return " ".join(console.export_text().split())


def test_counts_and_means_of_a_step():
    assert STEP.to_dict() == {
        "model": "rekd_selector", "version": 3, "requests": 20, "failed": 2, "rows": 40, "executions": 10,
        "request_ms": 3.0, "queue_ms": 0.5, "input_ms": 0.1, "compute_ms": 2.3, "output_ms": 0.05,
        "other_ms": pytest.approx(0.05),
    }  # fmt: skip
    none = StepTotals.of({"name": "rekd", "version": "1", "inference_stats": {}})  # gRPC leaves zeros out
    assert (none.requests, none.rows, none.to_dict()["request_ms"], none.to_dict()["other_ms"]) == (0, 0, None, None)
    assert " - " in shown(ServerStatus("u", True, "2.51.0", (none,)))


def test_table_and_document():
    ensemble = replace(STEP, model="rekd", requests=1200)
    status = ServerStatus("http://127.0.0.1:2", True, "2.51.0", (ensemble, STEP), STATE)
    text = shown(status)
    for part in ("ready, Triton 2.51.0, version 3", "/models (process 7)", "1,200", "4.0", "2.300", "rekd_selector",
                 "the queues of its steps"):  # fmt: skip
        assert part in text
    assert "secret" not in text and "secret" not in json.dumps(status.to_dict())
    assert status.to_dict()["versions"] == [3] and status.to_dict()["steps"][1]["compute_ms"] == 2.3
    assert "started again 2 times" in shown(replace(status, running=replace(STATE, restarts=2)))
    assert "live, not ready" in shown(replace(status, ready=False))


def test_the_table_fits_80_columns():
    names = ("rekd", "rekd_answer", "rekd_predictor", "rekd_prepare", "rekd_selector", "rekd_single", "rekd_text")
    spent = {**STEP.nanoseconds, "request": 1_234_567 * 1_234_567_800}
    busy = replace(STEP, version=12, requests=1_234_567, failed=89_012, nanoseconds=spent)
    console = Console(width=80, file=io.StringIO())
    console.print(status_table(ServerStatus("u", True, "2.51.0", tuple(replace(busy, model=name) for name in names))))
    lines = console.file.getvalue().splitlines()
    assert "…" not in "".join(lines) and max(map(len, lines)) <= 80
    assert lines[0].split() == "model, version requests failed batch total queue input compute output other".split()
    assert [line.split()[:7] for line in lines[2:9]] == [[n, "12", "1.2", "M", "89,012", "4.0", "1235."] for n in names]


def test_without_an_address_there_must_be_one_server():
    with pytest.raises(ServerUnavailableError, match="no rekd-serve of yours is running here; fix: start one"):
        read_status(None)
    with pytest.raises(ServerUnavailableError, match="not one server, but http://127.0.0.1:2, http://127.0.0.1:9"):
        read_status(None, [STATE, replace(STATE, http_url="http://127.0.0.1:9")])


def test_no_response_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match="within 0.5 s"):
            read_status(f"127.0.0.1:{listener.getsockname()[1]}", timeout=0.5)
        assert time.monotonic() - began < 3.0
