"""The programs that break things on purpose can tell what is wrong: answers, errors, late calls, refusals, growth."""

import json
import random
import socketserver
import threading
import time
from collections import Counter
from types import SimpleNamespace

import _askers
import chaos
import pytest
from _malformed import ANSWERED, CUT, REFUSED, Case, exchange
from _malformed_cases import cases

from rekd_deploy.errors import DeadlineError

MAKERS = [[{"label": label, "probability": 0.75, "spans": [[0, 4]]} for _ in range(2)] for label in ("one", "other")]


@pytest.fixture
def ledger():
    return _askers.Ledger(["good", "bad"], MAKERS)


def test_each_answer_is_held_against_that_of_the_version_that_it_names(ledger):
    mixed = [MAKERS[0][0], MAKERS[1][1]]
    for version, answers in (("1", MAKERS[0]), ("4", MAKERS[1]), ("2", MAKERS[0]), ("1", mixed)):
        ledger.end(ledger.begin(1.0), "gRPC", (version, answers), [0, 1])
    near, far = ({**MAKERS[0][0], "probability": value} for value in (0.75005, 0.76))
    ledger.end(ledger.begin(1.0), "gRPC", ("1", [near]), [0])
    ledger.end(ledger.begin(1.0), "gRPC", ("1", [far]), [0])
    ledger.end(ledger.begin(1.0), "gRPC", ("1", MAKERS[1][:1]), [0])  # one request, so of one version
    assert ledger.outcomes == {"right": 3, "of two versions": 1, "wrong: gRPC": 3}
    assert ledger.versions == {"1": 5, "4": 1, "2": 1} and len(ledger.examples) == 3 and "gRPC" in ledger.last


def test_errors_of_other_trees_late_calls_and_those_that_never_end_are_told(ledger, monkeypatch):
    for found in (DeadlineError("late"), _askers.NoConnectionError(), ZeroDivisionError("mistake")):
        ledger.end(ledger.begin(1.0), "HTTP", found, [0])
    monkeypatch.setattr(_askers, "LATE_SECONDS", 0.05)
    number = ledger.begin(0.0)
    time.sleep(0.15)
    ledger.end(number, "HTTP", DeadlineError("late"), [0])
    ledger.begin(0.0)
    assert ledger.outcomes == {
        "typed: DeadlineError": 2, "plain HTTP found no connection": 1, "untyped: HTTP": 1, "late: HTTP": 1,
    }  # fmt: skip
    assert len(ledger.on_their_way) == 1


def test_nobody_asks_while_the_memory_is_measured(ledger, monkeypatch):
    class Unavailable:
        def __init__(self, *_given, **_options):
            pass

        def predict(self, *_given, **_options):
            time.sleep(0.02)
            raise DeadlineError("late")

        def __enter__(self):
            return self

        def __exit__(self, *_given):
            return None

    class Asynchronous(Unavailable):
        async def __aenter__(self):
            return self

        async def __aexit__(self, *_given):
            return None

    for name, made in (("Client", Unavailable), ("AsyncClient", Asynchronous), ("_PAUSES", {}), ("MOST_TEXTS", 1)):
        monkeypatch.setattr(_askers, name, made)
    monkeypatch.setattr(_askers, "ask_front", Unavailable().predict)
    askers = _askers.Askers({"grpc": "", "http": "", "front": ""}, ledger, 8, 1.0)
    try:
        assert askers.pause() and not ledger.on_their_way
        asked = ledger.outcomes.total()
        time.sleep(0.3)
        assert ledger.outcomes.total() == asked > 0
        askers.go_on()
        time.sleep(0.3)
        assert ledger.outcomes.total() > asked
    finally:
        assert askers.end() == 0


@pytest.mark.parametrize(("change", "broken"), [
    ({}, []), ({"outcomes": {"right": 5, "wrong: gRPC": 1}}, ["wrong answers"]), ({"lost": 1}, ["lost calls"]),
    ({"outcomes": {"late: HTTP": 1}}, ["lost calls"]), ({"outcomes": {"untyped: HTTP": 1}}, ["untyped errors"]),
    ({"seconds_since_last_right": {"gRPC": 100.0}}, ["ways of asking that were not answered again"]),
    ({"memory_mb": [[number, 100.0 + number] for number in range(100)]}, ["memory that grows"]),
])  # fmt: skip
def test_which_promises_were_broken(change, broken):
    found = {"outcomes": {"right": 5, "typed: DeadlineError": 2}, "lost": 0, "seconds_since_last_right": {"gRPC": 0.1},
             "memory_mb": [[number, 100.0 + number % 7] for number in range(100)]} | change  # fmt: skip
    happening = SimpleNamespace(happened=Counter(), published=1)
    assert chaos.summary(found, happening, Counter())["broken"] == broken


PROBLEM = json.dumps({"type": "/problems/x", "status": 400, "detail": "why"}).encode()


@pytest.mark.parametrize(("answer", "expected", "fault"), [
    (b"400 Bad\r\nContent-Type: application/problem+json", REFUSED, ""), (b"200 OK", ANSWERED, ""),
    (b"200 OK", REFUSED, "it was not refused"),
    (b"500 No\r\nContent-Type: application/problem+json", ANSWERED, "status 500"),
    (b"400 Bad\r\nContent-Type: text/plain", REFUSED, "no problem details"),
    (b"422 Bad\r\nContent-Type: application/problem+json", REFUSED, "that say nothing"),
    (b"", REFUSED, "no answer"), (b"", CUT, ""), (None, CUT, "it hangs"),
])  # fmt: skip
def test_what_comes_back_is_judged(monkeypatch, answer, expected, fault):
    monkeypatch.setattr("_malformed._PATIENCE", 0.3)
    ended = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            if answer is None:
                ended.wait(5)
            elif answer:
                self.request.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (answer, len(PROBLEM), PROBLEM))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        found = exchange(server.server_address, Case("kind", [b"GET / HTTP/1.1\r\n\r\n"], expected))
        ended.set()
        server.shutdown()
    assert fault in found.fault and bool(fault) == bool(found.fault)


def test_as_many_requests_as_are_wanted_and_the_same_ones_by_the_same_seed():
    one, other = (list(cases(700, 4.0, random.Random(3))) for _ in range(2))
    assert len(one) == 700 and one == other and len({case.kind for case in one}) > 50
