"""Both clients without a server: splitting, order, pipelining, retries, deadlines, a typed error for each failure."""

import asyncio
import base64
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import make_rationalizer
from servers import wait_until

from rekd_deploy import AsyncClient, Client, RetryPolicy, errors
from rekd_deploy.client.client import IN_FLIGHT
from rekd_deploy.client.connection import Address
from rekd_deploy.client.transport import Arrays, Transport
from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import ClientError, DeadlineError, RepositoryError, ServerUnavailableError, VersionMismatchError
from rekd_train.errors import InputError
from rekd_train.inputs.familiarity import Familiarity
from rekd_train.inputs.text import TextPreprocessor

QUICK = RetryPolicy(first_pause=0.001)
DOWN = ServerUnavailableError("down")


class FakeServer(Transport):
    """Responds by rule, one request after the other, and fails on demand.

    It keeps the first word of each text; the probability of 'positive' is the text's share of the longest sequence.
    """

    _told = _is_ready = None  # never asked

    def __init__(self, parameters):
        super().__init__(Address.parse("127.0.0.1:1"), 30.0, {})
        self._workers, self._lock, self._numbers = ThreadPoolExecutor(1), threading.Lock(), {}
        self.configs, self.config_reads = {"1": parameters}, 0
        self.models, self.asked_models = {"rekd"}, []
        self.shapes, self.ids, self.asked, self.timeouts, self.threads = [], [], [], [], set()
        self.open = self.begun = self.most_open = 0
        self.gate, self.opens_when_full = threading.Event(), False
        self.gate.set()
        self.fail_at, self.fail_config, self.change, self.closed = {}, [], lambda outputs: outputs, False

    @property
    def version(self):
        return max(self.configs, key=int)

    def model_versions(self, model, timeout):
        if model not in self.models:
            raise errors.ModelMissingError(f"no model {model}")
        if self.fail_config:
            raise self.fail_config.pop()
        return list(self.configs)

    def model_config(self, model, version, timeout):
        self.config_reads += 1
        return self.configs[version], 4

    def submit(self, model, inputs, outputs, *, timeout=None, request_id="", version="", wait=False):
        with self._lock:
            self._numbers[id(inputs)] = len(self.ids)
            self.shapes.append(inputs["input_ids"].shape)
            self.asked_models.append(model)
            self.ids.append(request_id)
            self.asked.append(version)
            self.timeouts.append(timeout)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            if self.opens_when_full and self.open >= IN_FLIGHT:  # as many as a call may have on their way
                self.gate.set()
        return super().submit(model, inputs, outputs, timeout=timeout, request_id=request_id, wait=wait)

    def infer(self, request):
        self.begun += 1
        self.threads.add(threading.current_thread())
        self.gate.wait(5)
        with self._lock:
            self.open -= 1
        if request.model not in self.models:
            raise errors.ModelMissingError(f"no model {request.model}")
        if failure := self.fail_at.get(self._numbers[id(request.inputs)]):
            raise failure
        ids, share = request.inputs["input_ids"], request.inputs["attention_mask"].sum(axis=1) / 48
        mask = np.arange(ids.shape[1])[None, :] == np.ones(len(ids), dtype=int)[:, None]
        probabilities = np.stack([1 - share, share], axis=1).astype(np.float32)
        arrays = self.change({"scores": ids.astype(np.float32), "mask": mask, "probabilities": probabilities})
        outputs = Arrays({name: array for name, array in arrays.items() if name in request.outputs})
        outputs.version = self.version
        return outputs

    def close(self):
        self.closed = True
        super().close()


class Waited:
    """An AsyncClient as if it were a Client: every call runs an event loop of its own."""

    def __init__(self, **options):
        self._client = AsyncClient(**options)

    def __getattr__(self, name):
        return lambda *given, **options: asyncio.run(getattr(self._client, name)(*given, **options))


@pytest.fixture(params=[Client, Waited], ids=["sync", "async"])
def kind(request):
    return request.param


def parameters_of(model):
    return ServedDescription.of(model.preprocessor, tuple(model.labels), model.policy.budget).to_parameters()


OTHER = parameters_of(make_rationalizer(max_length=40, labels=("no", "yes")))


@pytest.fixture(scope="module")
def parameters(rationalizer):
    return parameters_of(rationalizer)


@pytest.fixture
def server(parameters):
    server = FakeServer(parameters)
    yield server
    server.gate.set()
    server.close()


@pytest.fixture
def client(kind, server):
    return kind(transport=server, retry=QUICK)


def goods(*lengths):
    return [" ".join(["good"] * length) for length in lengths]


def lengths_of(predictions):
    return [round(prediction.probabilities["positive"] * 48) - 2 for prediction in predictions]


def test_predictions_come_in_order_a_few_requests_at_once_in_batches_of_one_bucket(client, server):
    client.predict(goods(*[1] * 9, *[20] * 3, 44), request_id="order 17")
    assert server.shapes == [(4, 16), (4, 16), (1, 16), (3, 32), (1, 48)]
    assert server.ids == ["order 17", "order 17-2", "order 17-3", "order 17-4", "order 17-5"]
    lengths = [20, 1, 44, 3, 30, 2, 1, 15, 40, 9, 25]
    predictions = client.predict(goods(*lengths))
    assert lengths_of(predictions) == lengths
    assert all(prediction.rationale[0].text == "good" for prediction in predictions)
    server.gate.clear()
    server.opens_when_full = True
    client.predict(["good"] * 4 * (IN_FLIGHT + 3))
    assert server.most_open == IN_FLIGHT and server.config_reads == 1
    assert len(set(server.ids)) == len(server.ids) and all(server.ids)
    assert Client(transport=server).description.labels == ("negative", "positive")


def test_a_lone_text_is_sent_to_the_model_of_one_hop_where_it_is_served(kind, server, monkeypatch):
    server.models.add("rekd_single")
    client = kind(transport=server, retry=QUICK)
    for texts, windows in ((["good"], False), (["good"] * 2, False), (["good"], True)):
        client.predict(texts, windows=windows)
    assert server.asked_models == ["rekd_single", "rekd", "rekd"] and server.config_reads == 2
    server.configs["2"] = OTHER
    (found,) = client.predict(["good"])
    assert set(found.probabilities) == {"no", "yes"}, "another version is noticed there, too"
    server.models.remove("rekd_single")
    for _ in range(2):
        assert len(client.predict(["good"])) == 1
    # twice for the new version, once in vain; the ensemble's new version is noticed likewise
    assert server.asked_models[3:] == ["rekd_single"] * 3 + ["rekd"] * 3, "once it is gone, it is not asked at once"
    server.models.add("rekd_single")
    assert client.predict(["good"]) and server.asked_models[-1] == "rekd"
    monkeypatch.setattr("rekd_deploy.client.client._LONE_SECONDS", 0.0)
    client = kind(transport=server, retry=QUICK)
    server.models.remove("rekd_single")
    client.predict(["good"])
    server.models.add("rekd_single")
    client.predict(["good"])
    assert server.asked_models[-2:] == ["rekd", "rekd_single"], "it was only gone while the server was started again"
    for options, asked in (({"lone": None}, "rekd"), ({"model": "rekd_single"}, "rekd_single"), ({}, "rekd_single")):
        kind(transport=server, **options).predict(["good"])
        assert server.asked_models[-1] == asked


BAD_ARGUMENTS = [("deadline", value) for value in (0, float("nan"))]
BAD_ARGUMENTS += [("request_id", value) for value in ("", "two\nlines", 7, "x" * 129)]  # they would spoil a log
BAD_ARGUMENTS += [("items", value) for value in ([], ["good", "  \n"], "just one", iter("ab"))]


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS)
def test_arguments_of_a_call_that_cannot_be_used(client, server, name, value):
    with pytest.raises(InputError, match="text" if name == "items" else f"^{name} "):
        client.predict(**{"items": ["good"], name: value})
    assert server.shapes == []


def test_options_that_cannot_be_used_and_pauses_that_double_up_to_the_longest_shortened_by_chance():
    bad = [(Client, {"timeout": 0}), (AsyncClient, {"timeout": float("nan")}), (Client, {"url": "nowhere"})]
    bad += [(RetryPolicy, each) for each in ({"attempts": 0}, {"first_pause": -1.0}, {"first_pause": 9.0})]
    for made, options in bad:
        with pytest.raises(ClientError, match="it must|is no address"):
            made(**options)
    chance = iter([0.0, 0.0, 1.0, 0.5, 0.0, 0.0])
    policy = RetryPolicy(attempts=7, first_pause=0.1, longest_pause=1.0, jitter=lambda: next(chance))
    pauses = [policy.pause(errors.ServerBusyError(""), made, float("inf")) for made in range(1, 8)]
    assert pauses == pytest.approx([0.1, 0.2, 0.2, 0.6, 1.0, 1.0, None])
    assert RetryPolicy().pause(DOWN, 1, remaining=0.04) is None, "the deadline comes first"


@pytest.mark.parametrize("failure", [DeadlineError("x"), errors.RejectedError("x"), errors.ModelMissingError("x")])
def test_what_does_not_pass_is_raised_and_the_client_goes_on(client, server, failure):
    server.fail_at = {2: failure}
    with pytest.raises(type(failure)):
        client.predict(["good"] * 30)
    assert len(server.shapes) <= 3 + IN_FLIGHT, "nothing is sent again"
    server.fail_at = {}
    assert len(client.predict(["good"] * 5)) == 5


@pytest.mark.parametrize("failure", [DOWN, errors.ServerBusyError("x")])
def test_what_may_pass_is_sent_again(client, server, failure):
    server.fail_config = [failure] * (QUICK.attempts - 1)
    server.fail_at = dict.fromkeys([0, 3, 4, 5, 7], failure)
    assert lengths_of(client.predict(goods(*range(1, 41)))) == list(range(1, 41))
    assert len(server.shapes) == 4 + 4 + 3 + 5, "batches of three buckets, and each failure once more"
    assert len(set(server.ids)) == 4 + 4 + 3, "an attempt keeps its request's id"
    server.fail_at = dict.fromkeys(range(100), failure)
    with pytest.raises(type(failure)):
        client.predict(["good"])
    assert len(server.shapes) == 16 + QUICK.attempts, "as often as the policy says"


def test_a_lone_request_is_waited_for_in_its_thread(client, kind, server):
    server.ends_in_time, main = True, {threading.main_thread()}
    client.predict(["good"] * 3)
    assert (server.threads == main) == (kind is Client), "an event loop does not block"
    for lengths in ([3] * 5, [3, 20]):
        server.threads = set()
        assert lengths_of(client.predict(goods(*lengths))) == lengths
        assert not server.threads & main, "two requests are on their way at once"


def test_a_call_ends_at_its_deadline_and_no_request_takes_longer_than_its_timeout(kind, server, monkeypatch):
    server.fail_at = dict.fromkeys(range(1000), DOWN)
    client = kind(transport=server, retry=RetryPolicy(attempts=1000, first_pause=0.01, longest_pause=0.05))
    begun = time.monotonic()
    with pytest.raises((DeadlineError, ServerUnavailableError)):
        client.predict(["good"], deadline=0.3)
    assert time.monotonic() - begun < 0.6
    assert max(server.timeouts) <= 0.3 and server.timeouts == sorted(server.timeouts, reverse=True)
    server.fail_at = {}
    monkeypatch.setattr("rekd_deploy.client.calls.GRACE", 0.05)
    client = kind(transport=server, timeout=0.1)
    client.predict(["good"])
    server.gate.clear()
    with pytest.raises(DeadlineError, match=r"within 0\.1 s \(request [0-9a-f]{16}\); fix: a longer timeout"):
        client.predict(["good"])
    with pytest.raises(DeadlineError, match=r"not finished within 0\.05 s"):
        client.predict(["good"], deadline=0.05)


@pytest.mark.parametrize("pausing", [False, True])
def test_a_cancelled_task_ends_its_pauses_and_abandons_its_requests(server, pausing):
    server.fail_at = {0: DOWN} if pausing else {}
    if not pausing:
        server.gate.clear()
    async def impatient():
        client = AsyncClient(transport=server, retry=RetryPolicy(first_pause=60.0, longest_pause=60.0))
        task = asyncio.create_task(client.predict(["good"] * 4 * IN_FLIGHT))
        while len(server.ids) < IN_FLIGHT or server.begun < 1:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(asyncio.to_thread(client._threads.shutdown), 5)  # it waits no longer
        server.gate.set()
    asyncio.run(impatient())
    server.close()
    assert len(server.ids) == IN_FLIGHT, "nothing more is sent"
    assert pausing or server.open == IN_FLIGHT - 1, "the one being answered is; those behind it never"


def test_a_call_that_waits_for_its_turn_ends_at_its_deadline(server, monkeypatch):
    monkeypatch.setattr("rekd_deploy.client.client.CALLS", 1)
    monkeypatch.setattr("rekd_deploy.client.client.GRACE", 0.1)
    async def crowd():
        client = AsyncClient(transport=server)
        server.gate.clear()
        first = asyncio.create_task(client.predict(["good"]))
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineError, match=r"not finished within 0\.1 s"):
            await client.predict(["good"], deadline=0.1)
        server.gate.set()
        return await first
    assert lengths_of(asyncio.run(crowd())) == [1] and len(server.shapes) == 1


@pytest.mark.parametrize("attempts", [1, 100])
def test_a_closed_client_says_so(kind, server, attempts):
    client = kind(transport=server, retry=RetryPolicy(attempts=attempts, first_pause=0.001))
    client.predict(["good"])
    server.gate.clear()
    server.fail_at = {1: DOWN}
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.predict, ["good"])
        wait_until(lambda: server.begun == 2)
        pool.submit(client.close)
        wait_until(lambda: server.closed)
        server.gate.set()
        for call in (running.result, lambda: client.predict(["good"])):  # on its way, and afterwards
            with pytest.raises(ClientError, match="the client is closed; fix: close it once"):
                call()


def test_a_model_exchanged_behind_the_client_is_asked_in_its_own_way(client, server, parameters):
    client.predict(["good"])
    server.configs["2"] = dict(parameters)
    assert client.predict(["good"])[0].label == "negative"
    assert (server.config_reads, len(server.shapes)) == (2, 2), "one of the same kind is only looked at"
    server.configs["3"] = OTHER
    predictions = client.predict(goods(1, 44, 9))
    assert [set(prediction.probabilities) for prediction in predictions] == [{"no", "yes"}] * 3
    assert server.shapes[-1] == (1, 40) and predictions[1].truncated, "encoded anew, with the new model's length"
    sent = len(server.shapes)
    client.predict(["good"])
    assert len(server.shapes) == sent + 1 and server.config_reads == 3
    del server.configs["3"]
    assert client.predict(["good"])[0].label == "negative" and server.config_reads == 3, "the older one is back"


def test_versions_long_gone_are_let_go(client, server, parameters):
    client.predict(["good"])
    for number in range(2, 9):
        server.configs[str(number)] = dict(parameters)
        client.predict(["good"])
    assert server.config_reads == 8
    server.configs = {number: server.configs[number] for number in ("1", "7")}
    client.predict(["good"])
    assert server.config_reads == 8, "the one before is known"
    del server.configs["7"]
    client.predict(["good"])
    assert server.config_reads == 9, "the first is read again"


def test_another_model_of_the_same_tokens_answers_whatever_texts_it_has_learnt_from(client, server, parameters):
    usual = make_rationalizer()
    before = client.predict(["good"])[0].doubt
    usual.preprocessor.familiarity = Familiarity.fit([[5]], [[6]], vocabulary=40)
    server.configs["2"] = parameters_of(usual)
    assert client.predict(["good"])[0].doubt == usual.preprocessor(["good"]).doubts[0] != before
    assert len(server.shapes) == 2, "nothing is sent again"
    usual.preprocessor.familiarity = None
    server.configs["3"] = parameters_of(usual)
    assert client.predict(["good"])[0].doubt is None and len(server.shapes) == 3


def test_a_model_that_cannot_be_used_or_changes_all_the_time(kind, server, rationalizer, parameters):
    client = kind(transport=server, preprocessing=rationalizer.preprocessor.fingerprint)
    client.predict(["good"])
    tokenizer = rationalizer.preprocessor.tokenizer_json.replace('"film"', '"kilm"').encode()
    for version, changed, complaint in (
        ("2", OTHER, "this client wants"),
        ("3", parameters | {"tokenizer": base64.b64encode(zlib.compress(tokenizer)).decode()}, "fingerprint"),
        ("4", {key: value for key, value in parameters.items() if key != "labels"}, "no parameter labels")):
        server.configs[version] = changed
        with pytest.raises(VersionMismatchError, match=complaint):
            client.predict(["good"])
    server.configs = {}
    with pytest.raises(errors.ModelMissingError, match="no version of 'rekd'"):
        kind(transport=server).predict(["good"])
    class Restless(FakeServer):
        version = property(lambda self: str(len(self.shapes) + 1))
        def model_config(self, model, version, timeout):
            return (parameters, OTHER)[int(version) % 2], 4
    with pytest.raises(VersionMismatchError, match="changed the model 'rekd' 3 times"):
        kind(transport=Restless(parameters)).predict(["good"])


TEXT = '{"kind": "text", "max_length": %s, "lengths": []%s}'
BAD_PARAMETERS = [(key, None) for key in ("labels", "preprocessing", "tokenizer", "preprocessing_sha256")]
BAD_PARAMETERS += [("familiarity", "{}"), ("labels", "{"), ("tokenizer", "not base64!"), ("tokenizer", "QUJD")]
BAD_PARAMETERS += [("preprocessing", content) for content in ("[]", '{"kind": "image", "height": 16}',
                                                              TEXT.replace("text", "sound") % (8, ""), TEXT % (1, ""),
                                                              TEXT % (8, ', "unknown": 1'))]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_PARAMETERS)
def test_a_parameter_that_is_missing_or_unreadable(parameters, key, value):
    found = {name: text for name, text in (parameters | {key: value}).items() if text is not None}
    with pytest.raises(RepositoryError, match=f"no parameter {key};" if value is None else "cannot be (read|used)"):
        ServedDescription.from_parameters(found).preprocessor()


def test_probabilities_that_are_no_numbers_and_outputs_of_another_shape(client, server):
    server.change = lambda arrays: arrays["probabilities"][1:2].fill(np.nan) or arrays
    texts = ["good bad good", "good", "good bad"]  # the batch is sorted by length
    with pytest.raises(ClientError, match="row 1 of request order-7, item 2 of the call, with .* fix: rekd-export"):
        client.predict(texts, request_id="order-7")
    with pytest.raises(ClientError, match="row 1 of request order-8(-2)?, with"):
        client.predict(["good " * 200], windows=True, request_id="order-8")
    for change in ({"mask": np.ones((1, 3))}, {"probabilities": np.ones((1, 1))}, {"scores": None}):
        server.change = lambda arrays, change=change: arrays | change
        with pytest.raises(VersionMismatchError, match=f"gave {next(iter(change))} of shape"):
            client.predict(["good"])


def test_tasks_of_one_loop_which_computes_nothing_itself(server, monkeypatch):
    threads = set()
    def noted(original):
        return lambda *arguments: threads.add(threading.current_thread()) or original(*arguments)
    for owner, name in ((ServedDescription, "preprocessor"), (TextPreprocessor, "encode"), (FakeServer, "infer")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name)))
    versions = server.model_versions
    monkeypatch.setattr(server, "model_versions", lambda *given: time.sleep(0.1) or versions(*given))  # all wait for it
    async def everything():
        async with AsyncClient(transport=server) as client:
            found = await asyncio.gather(*(client.predict(goods(n) * 9) for n in range(1, 21)))
            assert (await client.description()).labels == ("negative", "positive")
            return found
    for n, predictions in enumerate(asyncio.run(everything()), 1):
        assert set(lengths_of(predictions)) == {n}
    assert server.config_reads == 1 and server.closed and threading.main_thread() not in threads
