"""Askers of ``chaos.py``: a process that asks in many ways at once, judges every answer, and watches its own memory.

    python benchmarks/_askers.py ADDRESSES.json EXPECTED.json COUNT DEADLINE OUTPUT.json     # until SIGTERM

Each call has a deadline. It must end by then, with the answer of the version that the answer names, or with an error of
the client's tree. ``EXPECTED.json`` has the texts and, for odd and for even versions, what the pipeline says of each.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import math
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import urllib3
from _served import resident

from rekd_deploy import AsyncClient, Client, ClientError
from rekd_deploy.errors import ModelMissingError, RejectedError

MOST_TEXTS = 6
LATE_SECONDS = 4.0
"""By so much a call may come after its deadline; time in which the whole process stood still does not count."""
_TIMEOUT_SHARE = 0.5
"""Of the deadline: what one request may take."""
_MEASURED_SECONDS = 15.0
"""From one look at the memory to the next. Nobody asks then: what is under way would drown what is kept."""
_PAUSES = {"a new client": 1.0}
"""Seconds from one call to the next: a new client makes the tokenizer anew, at the cost of many calls."""
_TEMPORARY = {404, 408, 502, 503, 504}
"""Statuses with which the front says that a server is not there, or not in time."""


class NoConnectionError(Exception):
    """What plain HTTP's own library says where nothing listens or a connection breaks."""


class FrontProblem(ClientError):
    """The front's problem details say that Triton is not there, or not in time."""


class WrongStatusError(Exception):
    """The front refused a good request, or failed by a mistake of its own."""


class Heartbeat(threading.Thread):
    """A thread that only sleeps: where it overslept, this process did not run, or others of its threads held it up."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gaps: list[tuple[float, float, float]] = []
        """From, to (``time.monotonic``), and seconds of processor time that this process used meanwhile."""

    def run(self) -> None:
        while True:
            begun, used = time.monotonic(), time.process_time()
            time.sleep(0.1)
            if (ended := time.monotonic()) - begun > 0.15:
                self.gaps.append((begun + 0.1, ended, time.process_time() - used))

    def within(self, begun: float, ended: float) -> float:
        """Seconds of that time that lie in gaps."""
        return sum(max(0.0, min(ended, to) - max(begun, since)) for since, to, _ in self.gaps)


class Ledger:
    """What came of the calls."""

    def __init__(self, texts: Sequence[str], makers: Sequence[Sequence[dict[str, Any]]]) -> None:
        self._texts, self._makers, self._lock = texts, makers, threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.examples: list[str] = []
        self.on_their_way: dict[int, float] = {}
        self.longest = 0.0
        self.last: dict[str, float] = {}
        """When a way of asking was last answered rightly, by ``time.time``."""
        self._numbers = iter(range(sys.maxsize))
        self.heart = Heartbeat()
        self.heart.start()

    def chosen(self, chance: random.Random) -> list[int]:
        """Which texts a call asks."""
        return chance.sample(range(len(self._texts)), chance.randint(1, MOST_TEXTS))

    def texts(self, chosen: Sequence[int]) -> list[str]:
        """Those texts."""
        return [self._texts[index] for index in chosen]

    def begin(self, deadline: float) -> int:
        """A call begins; returns its number."""
        with self._lock:
            number = next(self._numbers)
            self.on_their_way[number] = time.monotonic() + deadline
        return number

    def end(self, number: int, way: str, found: Any, chosen: Sequence[int]) -> None:
        """A call has ended, with (version, answers) or an exception."""
        with self._lock:
            due, now = self.on_their_way.pop(number), time.monotonic()
            late = now - due - self.heart.within(due, now)
            self.longest = max(self.longest, late)
            if late > LATE_SECONDS:
                self._count(f"late: {way}", f"{late:.1f} s after its deadline: {found!r}")
            if isinstance(found, ClientError):
                rare = str(found) if isinstance(found, (RejectedError, ModelMissingError)) else ""
                self._count(f"typed: {type(found).__name__}", rare)
            elif isinstance(found, NoConnectionError):
                self._count("plain HTTP found no connection")
            elif isinstance(found, BaseException):
                self._count(f"untyped: {way}", f"{type(found).__name__}: {found}")
            else:
                self._judge(way, *found, chosen)

    def _judge(self, way: str, version: str, answers: Sequence[dict[str, Any]], chosen: Sequence[int]) -> None:
        self.versions[version] += 1
        pairs = [*zip(answers, chosen, strict=True)]
        own, other = (self._makers[(int(version) + number) % 2] for number in (1, 0))
        others = [(answer, other[index]) for answer, index in pairs]
        right = [_alike(answer, own[index]) for answer, index in pairs]
        if all(right):
            self._count("right")
            self.last[way] = time.time()
        elif any(right) and all(yes or _alike(*each) for yes, each in zip(right, others, strict=True)):
            self._count("of two versions")  # of several requests, between which there was an exchange
        else:
            self._count(f"wrong: {way}", f"version {version}, texts {list(chosen)}: {answers}")

    def _count(self, what: str, example: str = "") -> None:
        self.outcomes[what] += 1
        if example and len(self.examples) < 20:
            self.examples.append(f"{what}: {example[:400]}")


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["label"], one["spans"]) == (other["label"], other["spans"]) and math.isclose(
        one["probability"], other["probability"], abs_tol=1e-4
    )


def answer_of(prediction: Any) -> dict[str, Any]:
    """What is compared of a prediction."""
    spans = [[span.start, span.end] for span in prediction.rationale]
    return {"label": prediction.label, "probability": prediction.probability, "spans": spans}


def ask_front(pool: urllib3.PoolManager, url: str, texts: list[str], deadline: float) -> tuple[str, list[Any]]:
    """Ask over plain HTTP."""
    try:
        response = pool.request("POST", f"{url}/v1/predict", json={"texts": texts}, retries=False,
                                timeout=urllib3.Timeout(total=deadline))  # fmt: skip
    except urllib3.exceptions.HTTPError as error:
        raise NoConnectionError from error
    document = response.json()
    if response.status in _TEMPORARY and document["detail"]:
        raise FrontProblem(document["detail"])
    if response.status != 200:
        raise WrongStatusError(f"{response.status}: {document}")
    answers = [{**answer, "spans": [[span["start"], span["end"]] for span in answer["spans"]]}
               for answer in document["answers"]]  # fmt: skip
    return document["version"], answers


class Askers:
    """``count`` askers: gRPC and HTTP clients that are shared, asyncio, a new client a call, plain HTTP."""

    def __init__(self, addresses: dict[str, str], ledger: Ledger, count: int, deadline: float) -> None:
        self._ledger, self._deadline, self.stopped, self._going = ledger, deadline, threading.Event(), threading.Event()
        self._going.set()
        options = {"timeout": deadline * _TIMEOUT_SHARE}
        grpc, http = (Client(addresses[name], **options) for name in ("grpc", "http"))
        pool = urllib3.PoolManager(maxsize=count)

        def fresh(texts: list[str]) -> Any:
            with Client(addresses["grpc"], **options) as client:
                return self._predicted(client, texts)

        ways: dict[str, Callable[[list[str]], Any]] = {
            "gRPC": lambda texts: self._predicted(grpc, texts), "HTTP": lambda texts: self._predicted(http, texts),
            "a new client": fresh, "plain HTTP": lambda texts: ask_front(pool, addresses["front"], texts, deadline),
        }  # fmt: skip
        kinds = ["gRPC", "HTTP", "plain HTTP", "gRPC", "HTTP", "asyncio", "asyncio", "a new client"]
        chosen = [kinds[number % len(kinds)] for number in range(count)]
        self._threads = [
            threading.Thread(target=self._ask, args=(way, ways[way], number), daemon=True)
            for number, way in enumerate(chosen) if way in ways
        ]  # fmt: skip
        tasks = chosen.count("asyncio")
        self._threads.append(threading.Thread(
            target=lambda: asyncio.run(self._ask_in_loop(addresses["grpc"], options, tasks)), daemon=True
        ))  # fmt: skip
        for thread in self._threads:
            thread.start()

    def pause(self) -> bool:
        """Let no call begin until ``go_on``, and wait for those on their way; whether all have ended."""
        self._going.clear()
        until = time.monotonic() + self._deadline + LATE_SECONDS
        while self._ledger.on_their_way and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5)  # one may have been about to begin
        return not self._ledger.on_their_way

    def go_on(self) -> None:
        """Let calls begin again."""
        self._going.set()

    def end(self) -> int:
        """Let all end; returns how many have not, long after their deadlines."""
        self.stopped.set()
        self.go_on()
        until = time.monotonic() + self._deadline + 10
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        return len(self._ledger.on_their_way)

    def _predicted(self, client: Client, texts: list[str]) -> Any:
        found = client.predict(texts, deadline=self._deadline)
        return found.version, [answer_of(each) for each in found]

    def _ask(self, way: str, call: Callable[[list[str]], Any], seed: int) -> None:
        chance = random.Random(seed)
        while not self.stopped.is_set():
            self._going.wait()
            chosen, number = self._ledger.chosen(chance), self._ledger.begin(self._deadline)
            try:
                found = call(self._ledger.texts(chosen))
            except Exception as error:
                found = error
            self._ledger.end(number, way, found, chosen)
            self.stopped.wait(_PAUSES[way] if way in _PAUSES else 0.1 if isinstance(found, Exception) else 0.01)

    async def _ask_in_loop(self, url: str, options: dict[str, float], count: int) -> None:
        async def ask(client: AsyncClient, seed: int) -> None:
            chance = random.Random(seed)
            while not self.stopped.is_set():
                while not self._going.is_set():
                    await asyncio.sleep(0.05)
                chosen, number = self._ledger.chosen(chance), self._ledger.begin(self._deadline)
                found: Any
                try:
                    predicted = await client.predict(self._ledger.texts(chosen), deadline=self._deadline)
                    found = predicted.version, [answer_of(each) for each in predicted]
                except Exception as error:
                    found = error
                self._ledger.end(number, "asyncio", found, chosen)
                await asyncio.sleep(0.1 if isinstance(found, Exception) else 0.01)

        async with AsyncClient(url, **options) as client:
            await asyncio.gather(*(ask(client, 1000 + number) for number in range(count)))


def held() -> float:
    """MB that this process holds on to: without garbage, and without what its allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def main(addresses: str, expected: str, count: str, deadline: str, output: str) -> None:
    """Ask until SIGTERM, then write what came of it."""
    known = json.loads(Path(expected).read_text())
    ledger = Ledger(known["texts"], known["makers"])
    begun, ended, memory = time.time(), threading.Event(), []
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    askers = Askers(json.loads(Path(addresses).read_text()), ledger, int(count), float(deadline))
    while not ended.wait(_MEASURED_SECONDS):
        if askers.pause():
            memory.append([round(time.time() - begun), held()])
        askers.go_on()
    lost, now = askers.end(), time.time()
    Path(output).write_text(json.dumps({
        "outcomes": dict(ledger.outcomes), "versions": dict(ledger.versions), "lost": lost, "examples": ledger.examples,
        "latest_after_its_deadline_seconds": round(ledger.longest, 2), "memory_mb": memory,
        "process_stood_still": {
            "times": len(gaps := ledger.heart.gaps), "seconds": round(sum(to - since for since, to, _ in gaps), 1),
            "longest_seconds": round(max((to - since for since, to, _ in gaps), default=0.0), 1),
            "processor_seconds_meanwhile": round(sum(used for *_, used in gaps), 1),
        },
        "seconds_since_last_right": {way: round(now - since, 1) for way, since in sorted(ledger.last.items())},
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
