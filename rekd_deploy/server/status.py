"""What a running Triton server says about itself: readiness, versions, and where the time of each step goes.

And the file in which rekd-serve writes down what it runs, so that ``rekd-serve --status`` finds it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.client.connection import Address, TlsSettings
from rekd_deploy.client.transport import open_transport
from rekd_deploy.errors import ClientError, RejectedError, ServerUnavailableError
from rekd_deploy.repository.config import ENSEMBLE
from rekd_deploy.server.flags import GRPC_KEY_HEADER, KEY_HEADER, LOOPBACK

if TYPE_CHECKING:
    from rich.table import Table

_PREFIX = "serving-"
PARTS = {"queue": "queue", "input": "compute_input", "compute": "compute_infer", "output": "compute_output"}
"""Parts of a request's time in a step, and what Triton's statistics call them."""
_TIMES = {"request": "success", **PARTS}


@dataclass(frozen=True)
class ServerState:
    """One running rekd-serve."""

    process_id: int
    """Of rekd-serve itself."""
    repository: str
    grpc_url: str
    http_url: str
    metrics_url: str
    log_file: str
    key: str
    """Of the restricted interfaces."""
    version: int
    restarts: int = 0
    beside: dict[str, str] = field(default_factory=dict)
    """Repositories of further models, by the models' names."""


def user_folder() -> Path:
    """Where logs and states of this user's servers lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rekd"


def write_state(state: ServerState) -> Path:
    """Write it where only this user can read it; returns the file."""
    folder = user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, work = tempfile.mkstemp(dir=folder)  # readable to others at no moment
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(state), file, indent=2)
    return Path(work).replace(folder / f"{_PREFIX}{state.process_id}.json")


def remove_state(process_id: int) -> None:
    """Forget a rekd-serve that ends."""
    (user_folder() / f"{_PREFIX}{process_id}.json").unlink(missing_ok=True)


def running_states() -> list[ServerState]:
    """This user's running servers, by process id; what killed ones left behind is removed."""
    found, known = [], {each.name for each in fields(ServerState)}
    for path in user_folder().glob(f"{_PREFIX}*.json"):
        with suppress(ValueError, TypeError):
            written = json.loads(path.read_text(encoding="utf-8"))  # perhaps by a later rekd, which says more
            state = ServerState(**{name: value for name, value in written.items() if name in known})
            try:
                os.kill(state.process_id, 0)
                found.append(state)
            except OSError:  # gone, or another user's by now
                path.unlink(missing_ok=True)
    return sorted(found, key=lambda state: state.process_id)


@dataclass(frozen=True)
class StepTotals:
    """One version of one model since its server started."""

    model: str
    version: int
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
        return cls(
            model=entry["name"],
            version=int(entry.get("version", 0)),
            requests=int(inference.get("success", {}).get("count", 0)),
            failed=int(inference.get("fail", {}).get("count", 0)),
            rows=int(entry.get("inference_count", 0)),
            executions=int(entry.get("execution_count", 0)),
            nanoseconds={name: int(inference.get(key, {}).get("ns", 0)) for name, key in _TIMES.items()},
        )

    def since(self, earlier: StepTotals | None) -> dict[str, float | int | None]:
        """``requests``, ``rows_per_batch``, and mean ``request_ms``, ``queue_ms``, ...; None: no request."""
        before = earlier or StepTotals(self.model, self.version, 0, 0, 0, 0, dict.fromkeys(self.nanoseconds, 0))
        requests, executions = self.requests - before.requests, self.executions - before.executions
        spent = {name: total - before.nanoseconds[name] for name, total in self.nanoseconds.items()}
        return {
            "requests": requests,
            "rows_per_batch": (self.rows - before.rows) / executions if executions else None,
            **{f"{name}_ms": value / requests / 1e6 if requests else None for name, value in spent.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """The counts, and means in milliseconds: ``request_ms``, its parts, and ``other_ms``.

        The last is what Triton counts under none of the parts. In a step: handing its answer over. In an ensemble,
        whose queue is its own alone: handing over between its steps, and waiting in their queues.
        """
        counts = asdict(self)
        del counts["nanoseconds"]
        means = {name: value for name, value in self.since(None).items() if name.endswith("_ms")}
        parts = [means[f"{name}_ms"] for name in PARTS]
        other = None if means["request_ms"] is None else max(means["request_ms"] - sum(parts), 0.0)
        return {**counts, **means, "other_ms": other}


@dataclass(frozen=True)
class ServerStatus:
    """A server at one moment, of which something answers."""

    url: str
    ready: bool
    """It is ready, and so is the ensemble."""
    triton: str
    """Triton's version."""
    steps: tuple[StepTotals, ...] = ()
    """By model and version."""
    running: ServerState | None = None
    """What rekd-serve wrote down, if it is one of this user's."""

    @property
    def versions(self) -> list[int]:
        """Versions of the ensemble that answer; one, but for the moment of an exchange."""
        return [step.version for step in self.steps if step.model == ENSEMBLE]

    def lines(self) -> list[str]:
        """For people, above the table."""
        state = "ready" if self.ready else "live, not ready"
        lines = [f"{self.url}  {state}, Triton {self.triton}, version {', '.join(map(str, self.versions)) or 'none'}"]
        if self.running is not None:
            again = f", started again {self.running.restarts} times" if self.running.restarts else ""
            lines += [
                f"serving  {self.running.repository} (process {self.running.process_id}{again})",
                *(f"beside   {repository} as {model}" for model, repository in self.running.beside.items()),
                f"metrics  {self.running.metrics_url}",
                f"log      {self.running.log_file}",
            ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For --json; without the key."""
        document = {**asdict(self), "live": True, "steps": [step.to_dict() for step in self.steps]}
        if self.running is not None:
            del document["running"]["key"]
        return {**document, "versions": self.versions}


def status_table(status: ServerStatus) -> Table:
    """A line for each version of each model, and what the figures are; at most 80 columns wide."""
    from rich import box
    from rich.table import Table

    note = "Mean milliseconds of a request. Other: handing over"
    if status.versions:
        note += f"; for an ensemble such as {ENSEMBLE}, also the queues of its steps, each shown at the step"
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), caption=f"{note}.", caption_justify="left"
    )
    table.add_column("model, version", overflow="fold")
    for title in ("requests", "failed", "batch", "total", *PARTS, "other"):
        table.add_column(title, justify="right", no_wrap=True)
    for step in status.steps:
        times = [value for name, value in step.to_dict().items() if name.endswith("_ms")]
        table.add_row(
            f"{step.model} {step.version}", _short(step.requests), _short(step.failed),
            f"{step.rows / step.executions:.1f}" if step.executions else "-",
            *("-" if value is None else f"{value:#.4g}" if value >= 1 else f"{value:.3f}" for value in times),
        )  # fmt: skip
    return table


def _short(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.1f} M"


def read_status(
    url: str | None, running: Sequence[ServerState] = (), timeout: float = 10.0, *, tls: TlsSettings | None = None
) -> ServerStatus:
    """Read the status of a server.

    Args:
        url: HOST:PORT for gRPC, http://HOST:PORT for HTTP; with TLS grpcs:// or https://. None: the one that runs.
        running: this user's servers; one that listens at ``url`` lends its key.
        timeout: seconds an answer may take.
        tls: for grpcs:// and https://.

    Raises:
        ServerUnavailableError: nothing answers there; without ``url``: there is none, or more than one.
        DeadlineError: no answer in time.
        RejectedError: its statistics take a key.
        ClientError: the address is none.
    """
    if url is None:
        if len(running) != 1:
            found = ", ".join(state.http_url for state in running) or "no rekd-serve of yours"
            raise ServerUnavailableError(f"not one server, but {found} is running here; fix: start one, or give a URL")
        url = running[0].http_url
    address = Address.parse(url)
    place = str(address).replace("localhost", LOOPBACK)
    state = next((each for each in running if place in (each.grpc_url, each.http_url)), None)
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
    steps = sorted(map(StepTotals.of, statistics), key=lambda step: (step.model, step.version))
    return ServerStatus(url, ready, triton, tuple(steps), state)
