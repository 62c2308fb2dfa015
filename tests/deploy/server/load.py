"""Clients that send requests without pause, and compare every response with the pipelines that may have made it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from itertools import count
from typing import NamedTuple

import numpy as np

from rekd_deploy.client.client import Client
from rekd_deploy.errors import ClientError


class Response(NamedTuple):
    """What one client got, in its order."""

    at: float
    maker: str
    """Name of the pipeline; 'nobody' for a response that none of them gives; else the name of an error."""


def key_of(prediction):
    """What a response is told apart by: label, spans, probabilities."""
    spans = tuple((span.start, span.end) for span in prediction.rationale)
    return prediction.label, spans, tuple(prediction.probabilities.values())


def alike(one, other, tolerance=1e-4):
    """Whether two responses are the same."""
    return one[:2] == other[:2] and all(abs(a - b) <= tolerance for a, b in zip(one[2], other[2], strict=True))


def ensemble_client(url):
    """A function: text -> key, through our client."""
    client = Client(url, timeout=20.0)
    return lambda text: key_of(client.predict([text])[0]), client.close


def text_endpoint_client(url):
    """A function: text -> key, through tritonclient and the text endpoint; nothing is tried twice."""
    import tritonclient.grpc as library

    client = library.InferenceServerClient(url)

    def request(text):
        given = library.InferInput("text", [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([[text.encode()]], dtype=object))
        result = client.infer("rekd_text", [given], client_timeout=20.0)
        spans = tuple((span["start"], span["end"]) for span in json.loads(result.as_numpy("rationale")[0, 0]))
        return result.as_numpy("label")[0, 0].decode(), spans, tuple(map(float, result.as_numpy("probabilities")[0]))

    return request, client.close


class Load:
    """Threads that send requests until the block ends, as a context manager.

    Args:
        clients: for each thread a function that opens a connection: () -> (request, close).
        texts: sent in turn.
        makers: name -> the keys of that pipeline's responses to the texts.
        tolerated: errors that are counted by name; any other fails the test.
    """

    def __init__(self, clients, texts, makers, tolerated=ClientError):
        self._clients, self._texts, self._makers, self._tolerated = clients, texts, makers, tolerated
        self._stop = threading.Event()
        self.responses: list[list[Response]] = [[] for _ in clients]
        self.surprises: list[BaseException] = []
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(len(clients))]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self.wait_for(lambda: all(self.responses))
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def counts(self, after=0.0):
        return Counter(each.maker for responses in self.responses for each in responses if each.at > after)

    def wait_for(self, condition, seconds=150.0):
        """Until the condition holds; fails when a thread came across something unexpected."""
        until = time.monotonic() + seconds
        while not condition():
            assert not self.surprises, self.surprises
            assert time.monotonic() < until, self.counts()
            time.sleep(0.02)

    def _work(self, number):
        try:
            request, close = self._clients[number]()
            for turn in count(number):
                if self._stop.is_set():
                    break
                began, index = time.monotonic(), turn % len(self._texts)
                try:
                    key = request(self._texts[index])
                    maker = next((name for name, keys in self._makers.items() if alike(keys[index], key)), "nobody")
                except self._tolerated as error:
                    maker = type(error).__name__
                    time.sleep(0.05)
                self.responses[number].append(Response(began, maker))
            close()
        except BaseException as error:
            self.surprises.append(error)
