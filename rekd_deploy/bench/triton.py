"""What Triton's own tools say of a load: the server's statistics, and its load generator perf_analyzer."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rekd_deploy.errors import BenchmarkError, ServerUnavailableError
from rekd_deploy.server.status import StepTotals
from rekd_train.errors import MissingExtraError
from rekd_train.files import write_json

_COLUMNS = {
    "concurrency": "Concurrency", "per_second": "Inferences/Second", "p50": "p50 latency", "p90": "p90 latency",
    "p95": "p95 latency", "p99": "p99 latency", "queue_ms": "Server Queue", "input_ms": "Server Compute Input",
    "compute_ms": "Server Compute Infer", "output_ms": "Server Compute Output",
}  # fmt: skip
"""Our names of its columns; its times are in microseconds."""
_MOST_INPUTS = 200
"""Requests that are written for it; it takes them one after another."""


def read_totals(url: str, timeout: float = 10.0) -> dict[str, StepTotals]:
    """Triton's statistics by model, of the server at a gRPC address, HOST:PORT.

    Raises:
        ServerUnavailableError: it does not answer, or does not tell.
    """
    import tritonclient.grpc
    from tritonclient.utils import InferenceServerException

    try:
        client = tritonclient.grpc.InferenceServerClient(url)
        try:
            response = client.get_inference_statistics(as_json=True, client_timeout=timeout)
        finally:
            client.close()
    except InferenceServerException as error:
        reason = " ".join(str(error.message()).split())
        raise ServerUnavailableError(
            f"the server at {url} does not tell its statistics ({reason}); fix: check the address, it must be gRPC's"
        ) from None
    totals: dict[str, StepTotals] = {}
    for entry in response.get("model_stats", []):
        found = StepTotals.of(entry)
        if entry["name"] not in totals or found.requests > totals[entry["name"]].requests:  # the version in use
            totals[entry["name"]] = found
    return totals


def steps_between(before: Mapping[str, StepTotals], after: Mapping[str, StepTotals]) -> dict[str, dict[str, Any]]:
    """What each model with requests did between two readings."""
    found = {name: totals.since(before.get(name)) for name, totals in after.items()}
    return {name: figures for name, figures in sorted(found.items()) if figures["requests"]}


def run_perf_analyzer(
    url: str, model: str, requests: Sequence[Mapping[str, np.ndarray]], concurrencies: Sequence[int], *,
    request_count: int, timeout: float,
) -> list[dict[str, float]]:  # fmt: skip
    """Its closed loop over gRPC, one concurrency after another: a second opinion.

    Args:
        requests: tensors by name, (1, ...) each; all of one shape, as it batches by shape.
        request_count: responses in each of its windows; it takes three or four.
        timeout: seconds that one concurrency may take.

    Returns:
        For each: ``concurrency``, ``per_second``, ``p50`` to ``p99``, and the server's ``queue_ms``, ``input_ms``,
        ``compute_ms``, ``output_ms``, in milliseconds.

    Raises:
        MissingExtraError: it is not installed.
        BenchmarkError: it failed, or told nothing.
    """
    try:
        metadata.version("perf-analyzer")
        program = Path(util.find_spec("perf_analyzer").origin).with_name("bin") / "perf_analyzer"
    except (metadata.PackageNotFoundError, AttributeError, TypeError):
        raise MissingExtraError("perf-analyzer", "perf") from None
    if not os.access(program, os.X_OK):
        raise BenchmarkError(f"{program} cannot be run; fix: pip install --force-reinstall perf-analyzer")
    with TemporaryDirectory(prefix="rekd-perf-") as folder:
        content = [
            {name: {"content": array[0].ravel().tolist(), "shape": list(array[0].shape)}
             for name, array in request.items()}  # the batch axis is its own
            for request in requests[:_MOST_INPUTS]
        ]  # fmt: skip
        write_json(Path(folder) / "inputs.json", {"data": content})
        command = [
            str(program), "-m", model, "-u", url, "-i", "grpc", "--input-data", "inputs.json", "--measurement-mode",
            "count_windows", "--measurement-request-count", str(request_count), "--max-trials", "4",
            "--stability-percentage", "999",  # it gives no figures at all where its windows differ by more
        ]  # fmt: skip
        return [_run_once(command, Path(folder), concurrency, timeout) for concurrency in concurrencies]


def _run_once(command: list[str], folder: Path, concurrency: int, timeout: float) -> dict[str, float]:
    report = folder / f"report_{concurrency}.csv"
    try:
        done = subprocess.run(
            [*command, "--concurrency-range", str(concurrency), "-f", str(report)], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, cwd=folder, errors="replace",
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
    return {ours: float(row[theirs]) / (1 if ours in counts else 1000)
            for ours, theirs in _COLUMNS.items() if row.get(theirs)}  # fmt: skip
