"""Both clients without a server: splitting, order, pipelining, retries, deadlines, a typed error for each failure."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import make_rationalizer
from fake_server import FakeServer, PatientServer

from rekd_deploy.client.batching import WindowedText
from rekd_deploy.client.calls import IN_FLIGHT
from rekd_deploy.client.client import AsyncClient, Client
from rekd_deploy.client.connection import RetryPolicy
from rekd_deploy.client.transport import ModelConfig
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import (
    ClientError,
    DeadlineError,
    ModelMissingError,
    RejectedError,
    ServerBusyError,
    ServerUnavailableError,
    VersionMismatchError,
)
from rekd_train.errors import InputError
from rekd_train.inputs.text import EncodedTexts, TextPreprocessor

QUICK = RetryPolicy(first_pause=0.001)


class Waited:
    """An AsyncClient as if it were a Client: every call runs an event loop of its own."""

    def __init__(self, *arguments, **options):
        self._client = AsyncClient(*arguments, **options)

    def predict(self, *arguments, **options):
        return asyncio.run(self._client.predict(*arguments, **options))

    @property
    def description(self):
        return asyncio.run(self._client.description())

    def close(self):
        asyncio.run(self._client.close())


@pytest.fixture(params=[Client, Waited], ids=["sync", "async"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def parameters(rationalizer):
    return ServedDescription.of(rationalizer.preprocessor, tuple(rationalizer.labels)).to_parameters()


@pytest.fixture
def server(parameters):
    server = FakeServer(parameters)
    yield server
    server.close()


@pytest.fixture
def client(kind, server):
    return kind(transport=server, retry=QUICK)


def lengths_of(answers):
    """Words of each text, as the fake server told them."""
    return [round(answer.probabilities["positive"] * 48) - 2 for answer in answers]


def test_answers_come_in_the_order_of_the_texts(client, server):
    lengths = [20, 1, 44, 3, 30, 2, 1, 15, 40, 9, 25]
    answers = client.predict([" ".join(["good"] * n) for n in lengths])
    assert lengths_of(answers) == lengths
    assert all(answer.rationale[0].text == "good" for answer in answers)
    assert server.config_reads == 1
    client.predict(["again"])
    assert server.config_reads == 1 and client.description.labels == ("negative", "positive")


def test_batches_hold_at_most_what_the_server_takes_of_one_bucket(client, server):
    client.predict(["good " * n for n in [1] * 9 + [20] * 3 + [44]])
    assert server.shapes == [(4, 16), (4, 16), (1, 16), (3, 32), (1, 48)]


def test_a_few_requests_are_on_their_way_at_once(client, server):
    server.wait_until_full()
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


def test_windows_of_a_long_text_are_asked_and_combined(client, server):
    long = " ".join(["good"] * 90)
    answers = client.predict(["bad", long, "good film"], windows=True)
    # 46 words a window, 11 of them shared with the one before: 46, 46 and 20
    assert sorted(server.shapes) == [(1, 32), (2, 16), (2, 48)]
    assert [answer.truncated for answer in answers] == [False, False, False]
    assert [span.start for span in answers[1].rationale] == [0, 5 * 35, 5 * 70]


# failures


@pytest.mark.parametrize(
    "failure", [DeadlineError("x"), RejectedError("x"), ModelMissingError("x"), VersionMismatchError("x")]
)
def test_a_failure_in_the_middle_is_raised_and_the_client_goes_on(client, server, failure):
    server.fail_at = {2: failure}
    with pytest.raises(type(failure)):
        client.predict(["good"] * 30)
    assert len(server.shapes) <= 3 + IN_FLIGHT, "only what may pass by itself is sent again"
    server.fail_at = {}
    assert len(client.predict(["good"] * 5)) == 5


@pytest.mark.parametrize("failure", [ServerUnavailableError("x"), ServerBusyError("x")])
def test_what_may_pass_is_asked_again(client, server, failure):
    lengths = list(range(1, 41))
    server.fail_at = dict.fromkeys([0, 3, 4, 5, 7], failure)
    assert lengths_of(client.predict(["good " * n for n in lengths])) == lengths
    assert len(server.shapes) == 4 + 4 + 3 + 5, "batches of three buckets, and each failure once more"


def test_a_lone_request_is_waited_for_in_its_thread(kind, parameters):
    server = PatientServer(parameters)
    client = kind(transport=server, retry=QUICK)
    assert lengths_of(client.predict(["good " * 3] * 3)) == [3] * 3
    assert server.waited_for == (kind is Client), "an event loop does not block"
    for lengths in ([3] * 5, [3, 20]):
        assert lengths_of(client.predict(["good " * n for n in lengths])) == lengths
        assert server.waited_for == (kind is Client), "two requests are on their way at once"
    assert len(server.shapes) == 5
    server.fail_at = {5: ServerUnavailableError("for a moment")}
    assert lengths_of(client.predict(["good"])) == [1]
    assert len(set(server.ids[5:])) == 1 and len(server.ids) == 7, "once more, under its id"
    server.close()


def test_as_often_as_the_policy_says(client, server):
    server.fail_at = dict.fromkeys(range(100), ServerUnavailableError("still down"))
    with pytest.raises(ServerUnavailableError, match="still down"):
        client.predict(["good"])
    assert len(server.shapes) == QUICK.attempts
    assert len(set(server.ids)) == 1, "an attempt keeps its request's id"


def test_the_description_is_asked_for_again_too(client, server):
    server.fail_config = [ServerUnavailableError("starting")] * (QUICK.attempts - 1)
    assert len(client.predict(["good"])) == 1
    server.fail_config = [RejectedError("no")]
    client.predict(["good"])
    assert server.fail_config, "it was read once"


def test_pauses_double_up_to_the_longest_and_are_shortened_by_chance():
    chance = iter([0.0, 0.0, 1.0, 0.5, 0.0, 0.0])
    policy = RetryPolicy(attempts=7, first_pause=0.1, longest_pause=1.0, jitter=lambda: next(chance))
    pauses = [policy.pause(ServerBusyError(""), made, float("inf")) for made in range(1, 8)]
    assert pauses == pytest.approx([0.1, 0.2, 0.2, 0.6, 1.0, 1.0, None])
    assert RetryPolicy().pause(ServerUnavailableError(""), 1, remaining=0.04) is None, "the deadline comes first"
    for error in (DeadlineError(""), RejectedError(""), ModelMissingError(""), InputError("")):
        assert RetryPolicy().pause(error, 1, float("inf")) is None


# deadlines


def test_a_call_ends_at_its_deadline(kind, server):
    server.fail_at = dict.fromkeys(range(1000), ServerUnavailableError("down"))
    client = kind(transport=server, retry=RetryPolicy(attempts=1000, first_pause=0.01, longest_pause=0.05))
    begun = time.monotonic()
    with pytest.raises((DeadlineError, ServerUnavailableError)):
        client.predict(["good"], deadline=0.3)
    assert time.monotonic() - begun < 0.6
    assert max(server.timeouts) <= 0.3 and server.timeouts == sorted(server.timeouts, reverse=True)


def test_no_request_may_take_longer_than_its_timeout(kind, server):
    client = kind(transport=server, timeout=0.1)
    client.predict(["good"])
    server.hold()
    with pytest.raises(DeadlineError, match=r"within 0\.1 s \(request [0-9a-f]{16}\); fix: a longer timeout"):
        client.predict(["good"])
    with pytest.raises(DeadlineError, match=r"not finished within 0\.05 s"):
        client.predict(["good"], deadline=0.05)
    server.gate.set()


def test_a_cancelled_task_abandons_its_requests(server):
    async def impatient():
        client = AsyncClient(transport=server)
        await client.predict(["good"])
        server.hold()
        task = asyncio.create_task(client.predict(["good"] * 4 * IN_FLIGHT))
        while server.open < IN_FLIGHT or server.begun < 2:  # the request before, and one of these
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(client._threads.shutdown)  # it waits no longer, though nothing was answered
        server.gate.set()

    asyncio.run(impatient())
    server.close()
    assert server.open == IN_FLIGHT - 1, "the one being answered is; those behind it never"


def test_a_cancelled_task_ends_its_pauses(server):
    async def impatient():
        server.fail_at = {0: ServerUnavailableError("down")}
        client = AsyncClient(transport=server, retry=RetryPolicy(first_pause=60.0, longest_pause=60.0))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.predict(["good"]), 0.2)
        await asyncio.to_thread(client._threads.shutdown)

    begun = time.monotonic()
    asyncio.run(impatient())
    assert time.monotonic() - begun < 5 and len(server.shapes) == 1, "nothing more is sent"


def test_a_call_that_waits_for_its_turn_ends_at_its_deadline(server, monkeypatch):
    monkeypatch.setattr("rekd_deploy.client.client.CALLS", 1)

    async def crowd():
        client = AsyncClient(transport=server)
        await client.predict(["good"])
        server.hold()
        first = asyncio.create_task(client.predict(["good"]))
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineError, match=r"not finished within 0\.1 s"):
            await client.predict(["good"], deadline=0.1)
        assert not first.done()
        server.gate.set()
        return await first

    assert lengths_of(asyncio.run(crowd())) == [1] and len(server.shapes) == 2


# closing


def test_close(server):
    with Client(transport=server):
        pass
    assert server.closed


@pytest.mark.parametrize("attempts", [1, 100])
def test_a_closed_client_says_so(kind, server, monkeypatch, attempts):
    client = kind(transport=server, retry=RetryPolicy(attempts=attempts, first_pause=0.001))

    def closed_meanwhile(*_, **__):
        client.close()
        raise ServerUnavailableError("broke off")

    monkeypatch.setattr(server, "submit", closed_meanwhile)
    for _ in range(2):  # on its way, and afterwards
        with pytest.raises(ClientError, match="the client is closed; fix: open another"):
            client.predict(["good"])


# ids


def test_requests_carry_ids(client, server):
    client.predict(["good"] * 9, request_id="order 17")
    assert server.ids == ["order 17", "order 17-2", "order 17-3"]
    client.predict(["good"])
    client.predict(["good"])
    assert len(set(server.ids)) == 5 and all(server.ids)


BAD_ARGUMENTS = [("deadline", value) for value in (0, -1.0, float("nan"))]
BAD_ARGUMENTS += [("request_id", value) for value in ("", "two\nlines", 7, "x" * 129)]  # they would spoil a log


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS)
def test_arguments_of_a_call_that_cannot_be_used(client, server, name, value):
    with pytest.raises(InputError, match=f"^{name} "):
        client.predict(["good"], **{name: value})
    assert server.config_reads == 0


# the model behind the address


def test_another_preprocessing_than_wanted(kind, server, rationalizer):
    kind(transport=server, preprocessing=rationalizer.preprocessor.fingerprint).predict(["good"])
    with pytest.raises(VersionMismatchError, match="this client wants 000"):
        kind(transport=server, preprocessing="0" * 64).predict(["good"])


@pytest.fixture(scope="module")
def other_parameters():
    """Of a model with shorter texts and other labels."""
    other = make_rationalizer(max_length=40, labels=("no", "yes"))
    return ServedDescription.of(other.preprocessor, tuple(other.labels)).to_parameters()


def test_a_model_exchanged_behind_the_client_is_asked_in_its_own_way(client, server, other_parameters):
    assert client.predict(["good"])[0].label == "negative"
    server.configs["2"] = other_parameters
    answers = client.predict(["good " * n for n in (1, 44, 9)])
    assert [set(answer.probabilities) for answer in answers] == [{"no", "yes"}] * 3
    assert server.shapes[-1] == (1, 40) and answers[1].truncated, "encoded anew, with the new model's length"
    asked = len(server.shapes)
    client.predict(["good"])
    assert len(server.shapes) == asked + 1 and server.config_reads == 2
    del server.configs["2"]
    assert client.predict(["good"])[0].label == "negative" and server.config_reads == 2, "the older one is back"


def test_a_new_version_of_the_same_kind_is_only_looked_at(client, server, parameters):
    client.predict(["good"])
    server.configs["2"] = dict(parameters)
    client.predict(["good"])
    assert (server.config_reads, len(server.shapes)) == (2, 2)


def test_an_exchanged_model_with_another_preprocessing_than_wanted(kind, server, rationalizer, other_parameters):
    client = kind(transport=server, preprocessing=rationalizer.preprocessor.fingerprint)
    client.predict(["good"])
    server.configs["2"] = other_parameters
    with pytest.raises(VersionMismatchError, match="this client wants"):
        client.predict(["good"])


def test_a_model_that_changes_all_the_time(kind, parameters, other_parameters):
    class Restless(FakeServer):
        @property
        def version(self):
            return str(len(self.shapes) + 1)

        def model_config(self, model, version, timeout):
            return ModelConfig((parameters, other_parameters)[int(version) % 2], 4)

    with pytest.raises(VersionMismatchError, match="changed the model 'rekd' 3 times"):
        kind(transport=Restless(parameters)).predict(["good"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"labels": None}, "no parameter labels"),
        ({"preprocessing_sha256": "0" * 64}, "fingerprint"),
        ({"preprocessing": '{"kind": "smell"}'}, "'smell' is unknown"),
    ],
)
def test_a_model_of_another_kind(kind, server, changes, complaint):
    changed = {key: value for key, value in (server.configs["1"] | changes).items() if value is not None}
    server.configs["1"] = changed
    with pytest.raises(VersionMismatchError, match=complaint):
        kind(transport=server).predict(["good"])


def test_a_model_without_a_version(client, server):
    server.configs = {}
    with pytest.raises(ModelMissingError, match="no version of 'rekd'"):
        client.predict(["good"])


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
    def second_row_is_nan(arrays):
        arrays["probabilities"][1:2] = np.nan
        return arrays

    server.change = second_row_is_nan
    with pytest.raises(ClientError) as error:  # the batch is sorted by length
        client.predict(["good bad good", "good", "good bad"], request_id="order-7")
    for part in ("row 1 of request order-7, item 2 of the call, with", "its graph got ids", "fix: rekd-export"):
        assert part in str(error.value)
    with pytest.raises(ClientError, match="row 1 of request order-8(-2)?, with"):
        client.predict(["good " * 200], windows=True, request_id="order-8")


# at once


def test_several_threads(kind, server, monkeypatch):
    versions = server.model_versions
    monkeypatch.setattr(server, "model_versions", lambda *given: time.sleep(0.1) or versions(*given))  # all wait for it
    client = kind(transport=server)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: client.predict(["good " * n] * 9), range(1, 9)))
    assert server.config_reads == 1
    assert [set(lengths_of(each)) for each in answers] == [{n} for n in range(1, 9)]


def test_several_tasks_of_one_loop(server):
    async def everything():
        async with AsyncClient(transport=server) as client:
            return await asyncio.gather(*(client.predict(["good " * n] * 9) for n in range(1, 21)))

    for n, answers in enumerate(asyncio.run(everything()), 1):
        assert set(lengths_of(answers)) == {n}
    assert server.config_reads == 1 and server.closed


def test_everything_that_computes_happens_outside_the_event_loop(server, monkeypatch):
    threads = set()

    def noted(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **options):
            threads.add((name, threading.current_thread() is threading.main_thread()))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    noted(ServedDescription, "preprocessor")
    noted(TextPreprocessor, "encode")
    noted(EncodedTexts, "predictions")
    noted(WindowedText, "combined")
    noted(FakeServer, "submit")
    noted(FakeServer, "model_config")

    async def ask():
        async with AsyncClient(transport=server) as client:
            await client.predict(["good " * 90], windows=True)

    asyncio.run(ask())
    assert threads == {
        (name, False)
        for name in ("preprocessor", "encode", "predictions", "combined", "submit", "model_config")
    }


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("nan")}, {"url": "nowhere"}])
def test_options_of_a_client_that_cannot_be_used(kind, options):
    with pytest.raises(ClientError):
        kind(**options)


@pytest.mark.parametrize("options", [{"attempts": 0}, {"first_pause": -1.0}, {"first_pause": 9.0}])
def test_options_of_a_policy_that_cannot_be_used(options):
    with pytest.raises(ClientError, match="it must"):
        RetryPolicy(**options)
