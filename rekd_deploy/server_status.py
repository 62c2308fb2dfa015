"""What a running Triton server says about itself: readiness, versions, and where the time of each step goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rekd_deploy.errors import ClientError, RejectedError, ServerUnavailableError
from rekd_deploy.server_flags import GRPC_KEY_HEADER, KEY_HEADER, LOOPBACK
from rekd_deploy.server_state import ServerState
from rekd_deploy.step_totals import PARTS, StepTotals
from rekd_deploy.triton_config import ENSEMBLE

if TYPE_CHECKING:
    from rich.table import Table


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
    """Mean time of a request in this step; None: there was none. The four parts of it:"""
    queue_ms: float | None
    input_ms: float | None
    compute_ms: float | None
    output_ms: float | None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> StepStatus:
        """From an entry of Triton's ``model_stats``; absent numbers are zero."""
        totals = StepTotals.of(entry)
        means = totals.since(None)
        return cls(
            model=entry["name"], version=int(entry["version"]), requests=totals.requests, failed=totals.failed,
            rows=totals.rows, executions=totals.executions,
            **{f"{name}_ms": means[f"{name}_ms"] for name in ("request", *PARTS)},
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
    """A line for each version of each model; times are means a request, in milliseconds."""
    from rich.table import Table

    table = Table("model", "version")
    for title in ("requests", "failed", "rows / batch", *(f"{name} ms" for name in ("request", *PARTS))):
        table.add_column(title, justify="right")
    for step in status.steps:
        rows = f"{step.rows / step.executions:.1f}" if step.executions else "-"
        times = (step.request_ms, step.queue_ms, step.input_ms, step.compute_ms, step.output_ms)
        table.add_row(
            step.model, str(step.version), f"{step.requests:,}", f"{step.failed:,}", rows,
            *("-" if value is None else f"{value:.3f}" for value in times),
        )
    return table


def read_status(url: str, running: Sequence[ServerState] = (), timeout: float = 10.0) -> ServerStatus:
    """Ask a server.

    Args:
        url: HOST:PORT for gRPC, http://HOST:PORT for HTTP.
        running: this user's servers; one that listens at ``url`` lends its key.
        timeout: seconds an answer may take.

    Raises:
        ServerUnavailableError: nothing answers there.
        RejectedError: its statistics take a key.
        ClientError: the address is none.
    """
    from tritonclient.utils import InferenceServerException

    protocol, address = _parsed(url)
    state = next((each for each in running if _same_place(protocol, address, each)), None)
    questions = _HttpQuestions if protocol == "http" else _GrpcQuestions
    asked = questions(address, state, timeout)
    try:
        if not asked.client.is_server_live():
            raise ServerUnavailableError(f"the server at {url} is not live; look into its log")
        statistics = asked.statistics()
        metadata = asked.metadata()
        ready = asked.client.is_server_ready() and asked.client.is_model_ready(ENSEMBLE)
    except InferenceServerException as error:
        raise _typed(error, url) from None
    except (OSError, ValueError) as error:
        raise ServerUnavailableError(f"no Triton server answers at {url} ({error}); fix: check the URL") from None
    finally:
        asked.client.close()
    steps = sorted(map(StepStatus.of, statistics), key=lambda step: (step.model, step.version))
    return ServerStatus(url, True, ready, metadata["version"], tuple(steps), state)


class _HttpQuestions:
    def __init__(self, address: str, state: ServerState | None, timeout: float) -> None:
        import tritonclient.http

        self.client = tritonclient.http.InferenceServerClient(
            address, connection_timeout=timeout, network_timeout=timeout
        )
        self._headers = {KEY_HEADER: state.key} if state else None

    def statistics(self) -> list[dict[str, Any]]:
        return self.client.get_inference_statistics(headers=self._headers)["model_stats"]

    def metadata(self) -> dict[str, Any]:
        return self.client.get_server_metadata()


class _GrpcQuestions:
    def __init__(self, address: str, state: ServerState | None, timeout: float) -> None:
        import tritonclient.grpc

        self.client = tritonclient.grpc.InferenceServerClient(address)
        self._headers = {GRPC_KEY_HEADER: state.key} if state else None
        self._timeout = timeout

    def statistics(self) -> list[dict[str, Any]]:
        answer = self.client.get_inference_statistics(
            headers=self._headers, as_json=True, client_timeout=self._timeout
        )
        return answer["model_stats"]

    def metadata(self) -> dict[str, Any]:
        return self.client.get_server_metadata(as_json=True, client_timeout=self._timeout)


def _parsed(url: str) -> tuple[str, str]:
    """Protocol ('grpc', 'http') and HOST:PORT."""
    try:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        if parts.scheme in ("grpc", "http") and parts.hostname and parts.port:
            return parts.scheme, parts.netloc
    except ValueError:  # a port that is no number
        pass
    raise ClientError(f"'{url}' is no address; give HOST:PORT for gRPC (localhost:8001) or http://HOST:PORT")


def _same_place(protocol: str, address: str, state: ServerState) -> bool:
    address = address.replace("localhost", LOOPBACK)
    return (f"http://{address}" if protocol == "http" else address) in state.urls


def _typed(error: Exception, url: str) -> ClientError:
    message = " ".join(str(error).split())
    if "restricted" in message.lower() or "header" in message.lower():
        return RejectedError(
            f"the statistics of {url} take a key ({message}); fix: ask on its machine, as the user who started it"
        )
    return ServerUnavailableError(f"no Triton server answers at {url} ({message}); fix: check the URL, or rekd-serve")
