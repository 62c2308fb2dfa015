"""What Triton's statistics say of one model, as totals since its server started and as means a request. torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = {"queue": "queue", "input": "compute_input", "compute": "compute_infer", "output": "compute_output"}
"""Parts of a request's time in a step, and what Triton's statistics call them."""


@dataclass(frozen=True)
class StepTotals:
    """One model since its server started."""

    requests: int
    """Answered."""
    failed: int
    """Answered with an error."""
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
            int(inference.get("fail", {}).get("count", 0)),
            int(entry.get("inference_count", 0)),
            int(entry.get("execution_count", 0)),
            {name: int(inference.get(key, {}).get("ns", 0)) for name, key in names.items()},
        )

    def since(self, earlier: StepTotals | None) -> dict[str, float | int | None]:
        """``requests``, ``rows_per_batch``, and mean ``request_ms``, ``queue_ms``, ...; None: no request."""
        nothing = StepTotals(0, 0, 0, 0, dict.fromkeys(self.nanoseconds, 0))
        before = earlier or nothing
        requests, executions = self.requests - before.requests, self.executions - before.executions
        spent = {name: total - before.nanoseconds[name] for name, total in self.nanoseconds.items()}
        return {
            "requests": requests,
            "rows_per_batch": (self.rows - before.rows) / executions if executions else None,
            **{f"{name}_ms": value / requests / 1e6 if requests else None for name, value in spent.items()},
        }
