"""Where the time of a request goes inside the server: the difference of two readings of Triton's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rekd_deploy.errors import ServerUnavailableError

PARTS = {"queue": "queue", "input": "compute_input", "compute": "compute_infer", "output": "compute_output"}
"""Parts of a request's time in a step, and what Triton's statistics call them."""


@dataclass(frozen=True)
class StepTotals:
    """One model since its server started."""

    requests: int
    """Answered."""
    rows: int
    """Texts or images in them."""
    executions: int
    """Batches that were computed."""
    nanoseconds: dict[str, int]
    """By the names of ``PARTS``, and ``request``: all of it; summed over the requests."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> StepTotals:
        """From an entry of Triton's ``model_stats``; absent numbers are zero."""
        inference = entry.get("inference_stats", {})
        names = {**PARTS, "request": "success"}
        return cls(
            int(inference.get("success", {}).get("count", 0)),
            int(entry.get("inference_count", 0)),
            int(entry.get("execution_count", 0)),
            {name: int(inference.get(key, {}).get("ns", 0)) for name, key in names.items()},
        )

    def since(self, earlier: StepTotals | None) -> dict[str, float | int | None]:
        """``requests``, ``rows_per_batch``, and mean ``request_ms``, ``queue_ms``, ...; None: no request."""
        nothing = StepTotals(0, 0, 0, dict.fromkeys(self.nanoseconds, 0))
        before = earlier or nothing
        requests, executions = self.requests - before.requests, self.executions - before.executions
        spent = {name: total - before.nanoseconds[name] for name, total in self.nanoseconds.items()}
        return {
            "requests": requests,
            "rows_per_batch": (self.rows - before.rows) / executions if executions else None,
            **{f"{name}_ms": value / requests / 1e6 if requests else None for name, value in spent.items()},
        }


def read_totals(url: str, timeout: float = 10.0) -> dict[str, StepTotals]:
    """Totals by model of the server at a gRPC address, HOST:PORT.

    Raises:
        ServerUnavailableError: it does not answer, or does not tell.
    """
    import tritonclient.grpc
    from tritonclient.utils import InferenceServerException

    try:
        client = tritonclient.grpc.InferenceServerClient(url)
        try:
            answer = client.get_inference_statistics(as_json=True, client_timeout=timeout)
        finally:
            client.close()
    except InferenceServerException as error:
        reason = " ".join(str(error.message()).split())
        raise ServerUnavailableError(
            f"the server at {url} does not tell its statistics ({reason}); fix: check the address, it must be gRPC's"
        ) from None
    totals: dict[str, StepTotals] = {}
    for entry in answer.get("model_stats", []):
        found = StepTotals.of(entry)
        if entry["name"] not in totals or found.requests > totals[entry["name"]].requests:  # the version that is asked
            totals[entry["name"]] = found
    return totals


def steps_between(before: Mapping[str, StepTotals], after: Mapping[str, StepTotals]) -> dict[str, dict[str, Any]]:
    """What each model that was asked did between two readings."""
    found = {name: totals.since(before.get(name)) for name, totals in after.items()}
    return {name: figures for name, figures in sorted(found.items()) if figures["requests"]}
