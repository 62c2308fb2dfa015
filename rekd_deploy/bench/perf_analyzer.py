"""Triton's own load generator, perf_analyzer, on real inputs: a second opinion on what the client measures."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rekd_deploy.errors import BenchmarkError
from rekd_train.errors import MissingExtraError
from rekd_train.files import write_json

_COLUMNS = {
    "concurrency": "Concurrency", "per_second": "Inferences/Second", "p50": "p50 latency", "p90": "p90 latency",
    "p95": "p95 latency", "p99": "p99 latency", "queue_ms": "Server Queue", "input_ms": "Server Compute Input",
    "compute_ms": "Server Compute Infer", "output_ms": "Server Compute Output",
}  # fmt: skip
"""Our names of its columns; its times are in microseconds."""
_ANY = "999"
"""Percent by which its windows may differ: it gives no figures at all where they differ by more."""
_MOST_INPUTS = 200
"""Requests that are written for it; it takes them in turns."""


def perf_analyzer_version() -> str:
    """The version of the wheel ``perf-analyzer``.

    Raises:
        MissingExtraError: it is not installed.
    """
    from importlib import metadata

    try:
        return metadata.version("perf-analyzer")
    except metadata.PackageNotFoundError:
        raise MissingExtraError("perf-analyzer", "perf") from None


def run_perf_analyzer(
    url: str, model: str, requests: Sequence[Mapping[str, np.ndarray]], concurrencies: Sequence[int], *,
    request_count: int, timeout: float,
) -> list[dict[str, float]]:  # fmt: skip
    """Its closed loop over gRPC, one concurrency after another.

    Args:
        url: HOST:PORT.
        requests: tensors by name, (1, ...) each; all of one shape, as it batches by shape.
        request_count: answers in each of its windows; it takes three or four.
        timeout: seconds that one concurrency may take.

    Returns:
        For each concurrency: ``concurrency``, ``per_second``, ``p50`` to ``p99``, and the server's ``queue_ms``,
        ``input_ms``, ``compute_ms``, ``output_ms``, in milliseconds.

    Raises:
        MissingExtraError: it is not installed.
        BenchmarkError: it failed, or told nothing.
    """
    perf_analyzer_version()
    with TemporaryDirectory(prefix="rekd-perf-") as folder:
        data = Path(folder) / "inputs.json"
        write_json(data, {"data": [_as_json(request) for request in requests[:_MOST_INPUTS]]})
        return [
            _run_once(url, model, data, concurrency, request_count, timeout) for concurrency in concurrencies
        ]


def _run_once(
    url: str, model: str, data: Path, concurrency: int, request_count: int, timeout: float
) -> dict[str, float]:
    report = data.with_name(f"report_{concurrency}.csv")
    command = [
        *_program(), "-m", model, "-u", url, "-i", "grpc", "--input-data", str(data),
        "--concurrency-range", str(concurrency), "--measurement-mode", "count_windows",
        "--measurement-request-count", str(request_count), "--stability-percentage", _ANY, "--max-trials", "4",
        "-f", str(report),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, cwd=data.parent,
            errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BenchmarkError(
            f"perf_analyzer did not end within {timeout:g} s at concurrency {concurrency}; fix: more --seconds, or "
            "--no-perf-analyzer"
        ) from None
    except OSError as error:
        raise BenchmarkError(f"perf_analyzer cannot be started: {error.strerror}; fix: --no-perf-analyzer") from None
    if done.returncode or not report.is_file():
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        marks = ("rror", "ailed", "GLIBC")
        reason = next((line for line in said if any(mark in line for mark in marks)), " ".join(said[-1:]))
        raise BenchmarkError(f"perf_analyzer failed with exit code {done.returncode}: {reason[:300]}")
    return read_report(report.read_text(encoding="utf-8"))


def read_report(text: str) -> dict[str, float]:
    """The first row of its CSV under our names; what it did not measure is left out.

    Raises:
        BenchmarkError: there is no row.
    """
    row = next(csv.DictReader(text.splitlines()), None)
    if row is None:
        raise BenchmarkError("perf_analyzer reported no figures; fix: more --seconds, or --no-perf-analyzer")
    counts = ("concurrency", "per_second")
    return {
        ours: float(row[theirs]) / (1 if ours in counts else 1000) for ours, theirs in _COLUMNS.items()
        if row.get(theirs)
    }  # fmt: skip


def _program() -> list[str]:
    from importlib import util

    found = util.find_spec("perf_analyzer")
    if found is None or found.origin is None:
        raise MissingExtraError("perf-analyzer", "perf")
    program = Path(found.origin).with_name("bin") / "perf_analyzer"
    if not os.access(program, os.X_OK):
        raise BenchmarkError(f"{program} cannot be run; fix: pip install --force-reinstall perf-analyzer")
    return [str(program)]


def _as_json(request: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One request as perf_analyzer reads it: the batch axis is its own."""
    rows = {name: array[0] for name, array in request.items()}
    return {name: {"content": row.ravel().tolist(), "shape": list(row.shape)} for name, row in rows.items()}
