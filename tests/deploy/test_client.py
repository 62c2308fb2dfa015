"""The client without a server: splitting, order, pipelining, and a typed error for each failure."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from rekd_deploy.client import Client
from rekd_deploy.errors import (
    ClientError,
    DeadlineError,
    RejectedError,
    ServerUnavailableError,
    VersionMismatchError,
)
from rekd_deploy.served import ServedDescription
from rekd_deploy.transport import IN_FLIGHT, Transport
from rekd_train.errors import InputError


class FakeServer(Transport):
    """Answers in the caller's thread; the probability of 'positive' is the share of the longest sequence."""

    def __init__(self, parameters, max_batch_size=4):
        self.parameters, self.max_batch_size = parameters, max_batch_size
        self.asked_for_config = 0
        self.shapes = []
        self.open = 0
        self.most_open = 0
        self.fail_at = {}
        self.change = lambda outputs: outputs
        self.closed = False

    def model_config(self, model):
        self.asked_for_config += 1
        return self.parameters, self.max_batch_size

    def submit(self, model, inputs, outputs):
        self.shapes.append(inputs["input_ids"].shape)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        number = len(self.shapes) - 1
        return _Late(lambda: self._answer(number, inputs, outputs))

    def _answer(self, number, inputs, outputs):
        self.open -= 1
        if number in self.fail_at:
            raise self.fail_at[number]
        ids, real = inputs["input_ids"], inputs["attention_mask"]
        share = real.sum(axis=1) / 48
        arrays = {
            "scores": ids.astype(np.float32),
            "mask": np.arange(ids.shape[1])[None, :] == np.ones(len(ids), dtype=int)[:, None],
            "probabilities": np.stack([1 - share, share], axis=1).astype(np.float32),
        }
        return {name: array for name, array in self.change(arrays).items() if name in outputs}

    def close(self):
        self.closed = True


class _Late(Future):
    """Computed when asked for."""

    def __init__(self, compute):
        super().__init__()
        self._compute = compute

    def result(self, timeout=None):
        return self._compute()


@pytest.fixture
def parameters(rationalizer):
    return ServedDescription.of(
        rationalizer.preprocessor, tuple(rationalizer.labels)
    ).to_parameters()


@pytest.fixture
def server(parameters):
    return FakeServer(parameters)


@pytest.fixture
def client(server):
    with Client(transport=server) as client:
        yield client


def test_answers_come_in_the_order_of_the_texts(client, server):
    lengths = [20, 1, 44, 3, 30, 2, 1, 15, 40, 9, 25]
    answers = client.predict([" ".join(["good"] * n) for n in lengths])
    assert [round(answer.probabilities["positive"] * 48) - 2 for answer in answers] == lengths
    assert all(answer.rationale[0].text == "good" for answer in answers)
    assert server.asked_for_config == 1
    client.predict(["again"])
    assert server.asked_for_config == 1


def test_batches_hold_at_most_what_the_server_takes_of_one_bucket(client, server):
    client.predict(["good " * n for n in [1] * 9 + [20] * 3 + [44]])
    assert server.shapes == [(4, 16), (4, 16), (1, 16), (3, 32), (1, 48)]


def test_a_few_requests_are_on_their_way_at_once(client, server):
    client.predict(["good"] * 4 * (IN_FLIGHT + 3))
    assert server.most_open == IN_FLIGHT


@pytest.mark.parametrize("texts", [[], [""], ["good", "  \n"], ["\ud800"], [b"bytes"], "just one", None, iter("ab")])
def test_bad_texts_are_refused_before_anything_is_sent(client, server, texts):
    with pytest.raises(InputError):
        client.predict(texts)
    assert server.shapes == []


def test_long_emoji_and_cjk_texts(client):
    long, mixed = client.predict(["good film " * 10_000, "東京 🎬 good"])
    assert long.truncated and not mixed.truncated
    assert mixed.text == "東京 🎬 good"


@pytest.mark.parametrize("failure", [ServerUnavailableError("x"), DeadlineError("x"), RejectedError("x")])
def test_a_failure_in_the_middle_is_raised_and_the_client_goes_on(client, server, failure):
    server.fail_at = {2: failure}
    with pytest.raises(type(failure)):
        client.predict(["good"] * 30)
    server.fail_at = {}
    assert len(client.predict(["good"] * 5)) == 5


def test_another_preprocessing_than_wanted(server, rationalizer):
    Client(transport=server, preprocessing=rationalizer.preprocessor.fingerprint).predict(["good"])
    with pytest.raises(VersionMismatchError, match="this client wants 000"):
        Client(transport=server, preprocessing="0" * 64).predict(["good"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"labels": None}, "no parameter labels"),
        ({"preprocessing_sha256": "0" * 64}, "fingerprint"),
        ({"preprocessing": '{"kind": "smell"}'}, "'smell' is unknown"),
    ],
)
def test_a_model_of_another_kind(parameters, changes, complaint):
    changed = {key: value for key, value in (parameters | changes).items() if value is not None}
    with pytest.raises(VersionMismatchError, match=complaint):
        Client(transport=FakeServer(changed)).predict(["good"])


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays | {"mask": arrays["mask"][:, :3]},
        lambda arrays: arrays | {"probabilities": arrays["probabilities"][:, :1]},
        lambda arrays: arrays | {"scores": None},
    ],
)
def test_answers_of_another_shape(client, server, change):
    server.change = change
    with pytest.raises(VersionMismatchError, match="of shape"):
        client.predict(["good"])


def test_answers_that_are_no_numbers(client, server):
    server.change = lambda arrays: arrays | {"probabilities": arrays["probabilities"] * np.nan}
    with pytest.raises(ClientError, match="no numbers"):
        client.predict(["good"])


def test_several_threads(client, server):
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: client.predict(["good " * n] * 9)})) for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked_for_config == 1
    for n, answers in results.items():
        assert {round(answer.probabilities["positive"] * 48) - 2 for answer in answers} == {n}


def test_close(server):
    with Client(transport=server):
        pass
    assert server.closed
