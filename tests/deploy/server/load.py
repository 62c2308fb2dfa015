"""Clients that ask a server without pause, and hold every answer against the pipelines that may have made it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from itertools import count
from typing import NamedTuple, Self

import numpy as np

from rekd_deploy.client.client import Client
from rekd_deploy.errors import ClientError

Key = tuple


class Answer(NamedTuple):
    """What one thread got, in its order."""

    at: float
    maker: str
    """Name of the pipeline; 'nobody' for an answer that none of them gives; else the name of an error."""


def key_of(prediction) -> Key:
    """What an answer is told apart by: label, spans, probabilities."""
    spans = tuple((span.start, span.end) for span in prediction.rationale)
    return prediction.label, spans, tuple(prediction.probabilities.values())


def alike(one: Key, other: Key, tolerance: float = 1e-4) -> bool:
    """Whether two answers are the same."""
    return one[:2] == other[:2] and all(abs(a - b) <= tolerance for a, b in zip(one[2], other[2], strict=True))


def ask_ensemble(url: str):
    """A function: text -> key, through the client."""
    client = Client(url, timeout=20.0)
    return lambda text: key_of(client.predict([text])[0]), client.close


def ask_raw_text(url: str):
    """A function: text -> key, through tritonclient and the ensemble that takes raw texts; nothing tries twice."""
    import tritonclient.grpc as library

    client = library.InferenceServerClient(url)

    def ask(text: str) -> Key:
        given = library.InferInput("text", [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([[text.encode()]], dtype=object))
        result = client.infer("rekd_text", [given], client_timeout=20.0)
        spans = tuple((span["start"], span["end"]) for span in json.loads(result.as_numpy("rationale")[0, 0]))
        probabilities = tuple(map(float, result.as_numpy("probabilities")[0]))
        return result.as_numpy("label")[0, 0].decode(), spans, probabilities

    return ask, client.close


class Load:
    """Threads that ask until the block ends, as a context manager.

    Args:
        askers: for each thread a function that opens a connection: () -> (ask, close).
        texts: asked in turn.
        makers: name -> the keys of that pipeline's answers to the texts.
        tolerated: errors that are counted by name; any other fails the test.
    """

    def __init__(self, askers, texts, makers, tolerated=ClientError) -> None:
        self._askers, self._texts, self._makers, self._tolerated = askers, texts, makers, tolerated
        self._stop = threading.Event()
        self.answers: list[list[Answer]] = [[] for _ in askers]
        self.surprises: list[BaseException] = []
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(len(askers))]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for(lambda: all(self.answers))
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def counts(self) -> Counter:
        return Counter(answer.maker for answers in self.answers for answer in answers)

    def answered_after(self, moment: float) -> Counter:
        return Counter(answer.maker for answers in self.answers for answer in answers if answer.at > moment)

    def wait_for(self, condition, seconds: float = 150.0) -> None:
        """Until the condition holds; fails when a thread came across something unexpected."""
        until = time.monotonic() + seconds
        while not condition():
            assert not self.surprises, self.surprises
            assert time.monotonic() < until, self.counts()
            time.sleep(0.02)

    def _work(self, number: int) -> None:
        try:
            ask, close = self._askers[number]()
            for turn in count(number):
                if self._stop.is_set():
                    break
                began = time.monotonic()
                index = turn % len(self._texts)
                try:
                    key = ask(self._texts[index])
                    makers = [name for name, keys in self._makers.items() if alike(keys[index], key)]
                    maker = makers[0] if makers else "nobody"
                except self._tolerated as error:
                    maker = type(error).__name__
                    time.sleep(0.05)
                self.answers[number].append(Answer(began, maker))
            close()
        except BaseException as error:
            self.surprises.append(error)
