"""Where the time of a request goes inside the server: the difference of two readings of Triton's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rekd_deploy.errors import ServerUnavailableError
from rekd_deploy.server.status import StepTotals


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
