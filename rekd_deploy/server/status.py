"""What a running Triton server says about itself: readiness, versions, and where the time of each step goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rekd_deploy.client.connection import Address, TlsSettings
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import ClientError, RejectedError, ServerUnavailableError
from rekd_deploy.repository.config import ENSEMBLE
from rekd_deploy.server.flags import GRPC_KEY_HEADER, KEY_HEADER, LOOPBACK
from rekd_deploy.server.service import ServerState

if TYPE_CHECKING:
    from rich.table import Table

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


@dataclass(frozen=True)
class StepStatus:
    """One version of one model since the server started; means are in milliseconds."""

    model: str
    version: int
    requests: int
    """Answered."""
    failed: int
    """Answered with an error."""
    rows: int
    """Texts or images in the answered requests."""
    executions: int
    """Batches that were computed."""
    request_ms: float | None
    """Mean time of a request in this step; None: there was none. The five parts of it:"""
    queue_ms: float | None
    input_ms: float | None
    compute_ms: float | None
    output_ms: float | None
    other_ms: float | None
    """What Triton counts under none of them. In a step: handing its answer over. In an ensemble, whose queue is
    its own alone: handing over between its steps, and waiting in their queues."""

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> StepStatus:
        """From an entry of Triton's ``model_stats``; absent numbers are zero."""
        totals = StepTotals.of(entry)
        means = totals.since(None)
        parts = [means[f"{name}_ms"] for name in PARTS]
        other = None if means["request_ms"] is None else max(means["request_ms"] - sum(parts), 0.0)
        return cls(
            model=entry["name"], version=int(entry["version"]), requests=totals.requests, failed=totals.failed,
            rows=totals.rows, executions=totals.executions,
            **{f"{name}_ms": means[f"{name}_ms"] for name in ("request", *PARTS)}, other_ms=other,
        )


@dataclass(frozen=True)
class ServerStatus:
    """A server at one moment."""

    url: str
    live: bool
    """It answers."""
    ready: bool
    """It is ready, and so is the ensemble."""
    triton: str
    """Triton's version."""
    steps: tuple[StepStatus, ...] = ()
    """By model and version."""
    running: ServerState | None = field(default=None, repr=False)
    """What rekd-serve wrote down, if it is one of this user's."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions of the ensemble that answer; one, but for the moment of an exchange."""
        return tuple(step.version for step in self.steps if step.model == ENSEMBLE)

    def lines(self) -> list[str]:
        """For people, above the table."""
        state = "ready" if self.ready else "live, not ready"
        lines = [f"{self.url}  {state}, Triton {self.triton}, version {', '.join(map(str, self.versions)) or 'none'}"]
        if self.running is not None:
            again = f", started again {self.running.restarts} times" if self.running.restarts else ""
            lines += [
                f"serving  {self.running.repository} (process {self.running.process_id}{again})",
                f"metrics  {self.running.metrics_url}",
                f"log      {self.running.log_file}",
            ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For --json; without the key."""
        document = asdict(self)
        document["versions"] = list(self.versions)
        if self.running is not None:
            del document["running"]["key"]
        return document


def choose_url(running: Sequence[ServerState]) -> str:
    """The address of the server that runs.

    Raises:
        ServerUnavailableError: there is none, or more than one.
    """
    if not running:
        raise ServerUnavailableError("no rekd-serve of yours is running here; fix: start one, or give a URL")
    if len(running) > 1:
        raise ServerUnavailableError(
            f"{len(running)} servers are running: {', '.join(state.http_url for state in running)}; fix: name one"
        )
    return running[0].http_url


def status_table(status: ServerStatus) -> Table:
    """A line for each version of each model, and what the figures are; at most 80 columns wide."""
    from rich import box
    from rich.table import Table

    note = "Mean milliseconds of a request. Other: handing over"
    if any(step.model == ENSEMBLE for step in status.steps):
        note += f"; for an ensemble such as {ENSEMBLE}, also the queues of its steps, each shown at the step"
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), caption=f"{note}.", caption_justify="left"
    )
    table.add_column("model, version", overflow="fold")
    for title in ("requests", "failed", "batch", "total", *PARTS, "other"):
        table.add_column(title, justify="right", no_wrap=True)
    for step in status.steps:
        times = (step.request_ms, step.queue_ms, step.input_ms, step.compute_ms, step.output_ms, step.other_ms)
        table.add_row(
            f"{step.model} {step.version}", _short(step.requests), _short(step.failed),
            f"{step.rows / step.executions:.1f}" if step.executions else "-",
            *("-" if value is None else f"{value:#.4g}" if value >= 1 else f"{value:.3f}" for value in times),
        )
    return table


def read_status(
    url: str, running: Sequence[ServerState] = (), timeout: float = 10.0, *, tls: TlsSettings | None = None
) -> ServerStatus:
    """Read the status of a server.

    Args:
        url: HOST:PORT for gRPC, http://HOST:PORT for HTTP; with TLS grpcs:// or https://.
        running: this user's servers; one that listens at ``url`` lends its key.
        timeout: seconds an answer may take.
        tls: for grpcs:// and https://.

    Raises:
        ServerUnavailableError: nothing answers there.
        DeadlineError: no answer in time.
        RejectedError: its statistics take a key.
        ClientError: the address is none.
    """
    address = Address.parse(url)
    place = str(address).replace("localhost", LOOPBACK)
    state = next((each for each in running if place in each.urls), None)
    key = KEY_HEADER if address.protocol == "http" else GRPC_KEY_HEADER
    transport = open_transport(url, timeout, headers={key: state.key} if state else None, tls=tls)
    try:
        triton, ready, statistics = transport.server_facts(ENSEMBLE, timeout)
    except ClientError as error:
        if isinstance(error, RejectedError) and "restricted" in str(error).lower():
            raise RejectedError(
                f"the statistics of {url} take a key ({error}); fix: run it on its machine, as the user who started it"
            ) from None
        raise
    finally:
        transport.close()
    steps = sorted(map(StepStatus.of, statistics), key=lambda step: (step.model, step.version))
    return ServerStatus(url, True, ready, triton, tuple(steps), state)


def _short(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.1f} M"
