"""Does ``rekd-serve --http`` refuse whatever is malformed with a reason, and answer good requests between?

Sent are requests that schemathesis makes of the front's own OpenAPI document, fitting and not, and bytes on sockets:
what is no HTTP, wrong lengths, cut and slow bodies, huge heads, JSON and forms that are none, compressed bombs, chance
changes of good ones. A malformed request must get 4xx with problem details (RFC 9457), none 5xx, and none may hang.
After every few of them a good one is sent, and its answer compared with the client's.

    pip install -e '.[fuzz]'
    python benchmarks/malformed_requests.py runs/demo/model_repository -o benchmarks/results/malformed_requests.json
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from _malformed import ANSWERED, Case, Outcome, exchange, fault_of
from _malformed_cases import cases
from _served import Served
from serving_throughput import keep

from rekd_train.cli.command import application, examples, run

TEXTS = ["A warm and moving film with wonderful acting.", "A dull, predictable story.", "Über 🎬 café, not bad at all."]
SECONDS = 4.0
"""What the server lets a head or a body take, so that slow ones are given up soon."""
_EVERY = 10
"""Malformed requests from one good one to the next."""
_THREADS = 12
_MOST_FAULTS = 20
_FLAT_MB = 20.0
"""By so much the server's memory may be larger at the end than in the middle."""

app = application(
    help="Send malformed requests to the HTTP front, and good ones between.",
    epilog=examples("malformed_requests.py REPO", "malformed_requests.py REPO --requests 10000 --seed 7"),
)


class Sending:
    """Sends requests to a front, keeps what came back, and asks a good one after every few."""

    def __init__(self, served: Served) -> None:
        from rekd_deploy import Client

        self._served = served
        self.url = served.addresses["front"]
        host, _, port = self.url.removeprefix("http://").partition(":")
        self._address = (host, int(port))
        with Client(served.addresses["grpc"]) as client:
            self._expected = client.predict(TEXTS)
        self.outcomes: list[Outcome] = []
        self.good: Counter[str] = Counter()
        self.memory: list[dict[str, float]] = []
        self._lock = threading.Lock()

    def socket_case(self, case: Case) -> None:
        """Send bytes."""
        self.note(exchange(self._address, case))

    def note(self, outcome: Outcome) -> None:
        """Keep an outcome; now and then a good request, and a look at the memory."""
        with self._lock:
            self.outcomes.append(outcome)
            number = len(self.outcomes)
        if number % _EVERY == 0:
            self.good["right" if self._good_is_right() else "wrong"] += 1
        if number % 100 == 0:
            self.memory.append({"requests": number, **self._served.memory()})

    def _good_is_right(self) -> bool:
        import requests

        response = requests.post(f"{self.url}/v1/predict", json={"texts": TEXTS}, timeout=60)
        answers = response.json().get("answers", [])
        return response.status_code == 200 and len(answers) == len(TEXTS) and all(
            answer["label"] == wanted.label and math.isclose(answer["probability"], wanted.probability, abs_tol=1e-4)
            and [span["text"] for span in answer["spans"]] == [span.text for span in wanted.rationale]
            for answer, wanted in zip(answers, self._expected, strict=True)
        )


def of_the_schema(url: str, count: int, seed: int) -> Iterator[Outcome]:
    """Requests that schemathesis makes of the OpenAPI document, ``count`` for each route and way."""
    import hypothesis
    import schemathesis
    from schemathesis import GenerationMode

    settings = hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip

    def made(strategy: Any, kind: str) -> list[Outcome]:
        found: list[Outcome] = []

        @hypothesis.seed(seed)
        @settings
        @hypothesis.given(strategy)
        def send(case: Any) -> None:
            found.append(_sent(kind, case))

        with suppress(hypothesis.errors.Unsatisfiable):  # a path that takes nothing has nothing that does not fit
            send()
        return found

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for operation in (result.ok() for result in schema.get_all_operations()):
        for mode in GenerationMode:
            yield from made(operation.as_strategy(generation_mode=mode), f"schema: {operation.label}, {mode.value}")


def _sent(kind: str, case: Any) -> Outcome:
    """Send what schemathesis made, and hold the answer to what the document promises."""
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi import checks

    begun = time.monotonic()
    response = case.call(timeout=60)
    fault = fault_of(response.status_code, response.headers.get("content-type", [""])[0], response.content, ANSWERED)
    promised = [checks.response_schema_conformance, checks.status_code_conformance, checks.content_type_conformance]
    if not fault:
        try:
            case.validate_response(response, checks=promised)
        except FailureGroup as failures:
            fault = " ".join(str(failures.exceptions[0]).split())[:300]
    return Outcome(kind, response.status_code, round(time.monotonic() - begun, 3), fault)


@app.command()
def malformed_requests(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="Of texts.")],
    requests: Annotated[int, typer.Option(min=200, help="Requests on sockets, besides those of the schema.")] = 3000,
    examples: Annotated[int, typer.Option(min=1, help="Of the schema, for each route, fitting and not.")] = 100,
    seed: Annotated[int, typer.Option(help="Of chance.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the figures go.")] = None,
) -> None:
    """Send them, print the figures and write them; exit code 1: something is not as it should be."""
    from importlib.util import find_spec

    from rekd_train.errors import MissingExtraError

    if find_spec("schemathesis") is None:
        raise MissingExtraError("schemathesis", "fuzz")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        limits = ["--limit", f"seconds={SECONDS:g}"]
        with Served(repository, Path(folder), "--http", "0", *limits) as served:
            sending = Sending(served)
            for outcome in of_the_schema(sending.url, examples, seed):
                sending.note(outcome)
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(sending.socket_case, cases(requests, SECONDS, random.Random(seed))))
            alive, lines = served.alive, served.lines
    figures = summary(sending)
    half, end = sending.memory[len(sending.memory) // 2], sending.memory[-1]
    grown = {name: round(end[name] - half[name], 1) for name in ("front", "triton")}
    tracebacks = sum("Traceback" in line for line in lines)
    figures |= {
        "memory_grown_in_the_second_half_mb": grown, "server_still_alive": alive, "tracebacks": tracebacks,
        "lines_of_the_server": len(lines), "minutes": round((time.monotonic() - begun) / 60, 1),
    }  # fmt: skip
    settings = {"seed": seed, "requests": requests, "examples": examples, "seconds_of_a_body": SECONDS}
    keep({"settings": {**settings, "threads": _THREADS}, **figures}, output)
    wrong = figures["faults"] or figures["good"].get("wrong") or tracebacks or not alive
    if wrong or max(grown.values()) > _FLAT_MB:
        raise typer.Exit(1)


def summary(sending: Sending) -> dict[str, Any]:
    """Statuses by kind, faults, the good requests between, the longest wait, the memory."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in sending.outcomes:
        kinds[outcome.kind][str(outcome.status or "closed")] += 1
    faulty = [outcome for outcome in sending.outcomes if outcome.fault]
    return {
        "malformed": len(sending.outcomes),
        "statuses": dict(sum(kinds.values(), Counter())),
        "faults": len(faulty),
        "first_faults": [outcome._asdict() for outcome in faulty[:_MOST_FAULTS]],
        "good": dict(sending.good),
        "longest_seconds": max(outcome.seconds for outcome in sending.outcomes),
        "memory_mb": sending.memory,
        "by_kind": {kind: dict(statuses) for kind, statuses in sorted(kinds.items())},
    }


if __name__ == "__main__":
    run(app)
