"""The real Triton under load: a new version comes, one that does not load is refused, the server is killed."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from itertools import combinations

import pytest
from conftest import make_rationalizer
from servers import Running, children_of, send, wait_until

from rekd_deploy import Client, ClientError, Pipeline, RetryPolicy, TritonServer
from rekd_deploy.export.graphs import export
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.live_repository import LiveRepository
from rekd_deploy.server.status import read_status, running_states
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.triton

TEXTS = ["the film was great and the actor is good but the plot was never very fun",
         "I think the story is dull, and the actor was awful. But the end is wonderful",
         " ".join(["not", "bad", "really", "always", "bright", "dark", "people", "see", "the", "start"] * 6)]
"""Long enough for two selectors to choose differently."""
TYPED = ("ServerUnavailableError", "RejectedError", "ModelMissingError", "Unanswered")


def key_of(prediction):
    spans = tuple((span.start, span.end) for span in prediction.rationale)
    return prediction.label, spans, tuple(prediction.probabilities.values())


def alike(one, other, tolerance=1e-4):
    return one[:2] == other[:2] and all(abs(a - b) <= tolerance for a, b in zip(one[2], other[2], strict=True))


def ensemble_client(url, retry=None):
    client = Client(url, timeout=20.0, retry=retry)
    return lambda text: key_of(client.predict([text])[0])


def text_endpoint_client(port):
    """A function: text -> key, over plain HTTP and the text endpoint; nothing is tried twice."""
    def request(text):
        body = json.dumps({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [text]}]})
        try:
            status, answer = send(port, "POST", "/v2/models/rekd_text/infer", body)
        except (OSError, HTTPException) as error:
            raise Unanswered from error
        if status != 200:
            raise Unanswered(answer)
        found = {each["name"]: each["data"] for each in json.loads(answer)["outputs"]}
        spans = tuple((span["start"], span["end"]) for span in json.loads(found["rationale"][0]))
        return found["label"][0], spans, tuple(found["probabilities"])
    return request


class Unanswered(Exception):
    pass


class Load:
    """Threads that send ``TEXTS`` in turn until the block ends, each with a function of its own that opens a client.

    Of each the responses: when it was asked, and the pipeline that made the response, nobody, or a tolerated error.
    """

    def __init__(self, clients, makers, tolerated):
        self._clients, self._makers, self._tolerated, self._going = clients, makers, tolerated, True
        self.responses = [[] for _ in clients]
        self._pool = ThreadPoolExecutor(len(clients))

    def __enter__(self):
        self._running = list(map(partial(self._pool.submit, self._work), self._clients, self.responses))
        self.wait_for(lambda: all(self.responses))
        return self

    def __exit__(self, *exception):
        self._going = False
        for running in self._running:
            running.result(30)

    def makers(self, after=0.0):
        return [maker for responses in self.responses for began, maker in responses if began > after]

    def wait_for(self, condition):
        wait_until(lambda: condition() or any(running.done() for running in self._running), 150)

    def _work(self, opened, responses):
        request = opened()
        while self._going:
            began, index = time.monotonic(), len(responses) % len(TEXTS)
            try:
                key = request(TEXTS[index])
                maker = next((name for name, keys in self._makers.items() if alike(keys[index], key)), "nobody")
            except self._tolerated as error:
                maker = type(error).__name__
                time.sleep(0.05)
            responses.append((began, maker))


@pytest.fixture(scope="module")
def models(artefacts, tmp_path_factory):
    """Name -> (artefacts, keys of its pipeline's answers): two models and the two mixtures of them."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    new = export(save(make_rationalizer(seed=1), folder / "checkpoint"), folder)
    mixtures = {"s": replace(artefacts, selector=new.selector), "p": replace(artefacts, predictor=new.predictor)}
    for name, made in {"old": artefacts, "new": new, **mixtures}.items():
        with Pipeline(write_repository(made, folder / name)) as pipeline:
            found[name] = made, [key_of(answer) for answer in pipeline.predict(TEXTS)]
    for (_, one), (_, other) in combinations(found.values(), 2):  # mixtures could be told
        assert not any(alike(*keys, tolerance=1e-3) for keys in zip(one, other, strict=True))
    return found


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """A function: name of a model -> the repository that is served, with that model exported over it."""
    root = tmp_path_factory.mktemp("exported") / "repository"
    return lambda name: write_repository(models[name][0], root, text_endpoint=True)


LINES = []


@pytest.fixture(autouse=True)
def lines():
    LINES.clear()
    return LINES


@pytest.fixture(scope="module")
def served(wheel, exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr("rekd_deploy.server.service._DRAIN_SECONDS", 1.0)
        patch.setattr("rekd_deploy.server.service._FIRST_PAUSE", 0.1)
        server = TritonServer(exported("old"), 0, 0, 0, log_file=folder / "log", reload=True)
        running = Running(server, 5, LINES)
        yield server
        assert not running.ended.done(), "it ends when it is told, not before"
        running.stopped.set()
        assert running.error() is None


@pytest.fixture
def load(served, models):
    """A function: tolerated errors -> six clients of three kinds; the last two of eight wait however long it takes."""
    makers = {name: keys for name, (_, keys) in models.items()}
    urls = (served.grpc_url, served.http_url)
    clients = [partial(text_endpoint_client, served.ports["http"])] * 2
    patient = RetryPolicy(attempts=1000, longest_pause=0.5)
    clients += [partial(ensemble_client, url, retry) for retry in (None, None, patient) for url in urls]
    return lambda *tolerated: Load(clients, makers, tolerated)


def ready_versions(server):
    return {(step.model, step.version) for step in read_status(server.http_url, running_states()).steps}


def test_a_new_version_under_load(served, load, lines, exported):
    with load() as clients:
        exported("new")
        clients.wait_for(lambda: "version 1 has left" in lines)
        served.check_alive()
        gone = time.monotonic()
        clients.wait_for(lambda: clients.makers(gone).count("new") > 100)
    assert set(clients.makers()) == {"old", "new"}
    for responses in clients.responses:  # one connection never goes back
        makers = [maker for _, maker in responses]
        assert makers == sorted(makers, reverse=True)
    names = ("rekd", "rekd_predictor", "rekd_selector", "rekd_text")
    assert ready_versions(served) == {(name, 2) for name in names}
    started = served.log_file.read_text().count("ModelInstanceInitialize: rekd_selector")
    assert started == 2  # once for each version: the old one was not loaded again beside itself
    status = read_status(served.http_url, running_states())
    assert status.ready and status.versions == [2] and status.running.version == 2


def test_a_version_that_does_not_load_is_refused_under_load(served, load, lines, exported, monkeypatch):
    place = LiveRepository.place
    def damaging(self, snapshot):
        place(self, snapshot)
        graph = self.models / "rekd_predictor" / str(snapshot.version) / "model.onnx"
        graph.unlink()
        graph.write_bytes(b"no graph")
    with load() as clients:
        monkeypatch.setattr(LiveRepository, "place", damaging)
        exported("old")
        clients.wait_for(lambda: lines)
        refused = time.monotonic()
        clients.wait_for(lambda: clients.makers(refused).count("new") > 100)
        served.check_alive()
    assert set(clients.makers()) == {"new"}
    assert "load_model rekd_predictor" in lines[0] and "version 2 serves on" in lines[0] and len(lines) == 1
    assert {version for _, version in ready_versions(served)} == {2}


@pytest.mark.parametrize("victim", ["server", "process of a model"])
def test_killed_under_load(served, load, lines, victim):
    """Without the process of a model Triton would answer errors for ever and call itself ready."""
    first, ports, restarts = served.process_id, dict(served.ports), running_states()[0].restarts
    with load(ClientError, Unanswered) as clients:
        os.kill(first if victim == "server" else min(children_of(first)), signal.SIGKILL)
        clients.wait_for(lambda: "the server answers again" in lines)
        again = time.monotonic() + 2.0  # gRPC connects anew with a pause
        clients.wait_for(lambda: all(each[-1][0] > again and each[-1][1] == "new" for each in clients.responses))
        clients.wait_for(lambda: clients.makers(again).count("new") > 10)  # and they go on
    assert served.process_id != first and served.ports == ports
    said = "killed by signal 9" if victim == "server" else "a process that runs one of the models has died"
    assert said in lines[0]
    assert {"new"} < set(clients.makers()) <= {"new", *TYPED}
    assert victim != "server" or {maker for patient in clients.responses[-2:] for _, maker in patient} == {"new"}
    (state,) = running_states()
    assert (state.restarts, state.version) == (restarts + 1, 2)
