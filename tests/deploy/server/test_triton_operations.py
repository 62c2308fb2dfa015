"""The real Triton under load: a new version comes, one that does not load is refused, the server is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
from load import Load, alike, ensemble_client, key_of, text_endpoint_client
from servers import children_of, wait_until
from tritonclient.utils import InferenceServerException

from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import ClientError, ServerError
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server import live_repository
from rekd_deploy.server.live_repository import LiveRepository, model_control
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.service import Service
from rekd_deploy.server.status import read_status, running_states

pytestmark = pytest.mark.triton

TEXTS = [
    "the film was great and the actor is good but the plot was never very fun",
    "I think the story is dull, and the actor was awful. But the end is wonderful",
    " ".join(["not", "bad", "really", "always", "bright", "dark", "people", "see", "the", "start"] * 6),
]
"""Long enough for two selectors to choose differently."""


def other_model(artefacts, folder: Path, role: str | None = None):
    """The same networks with other weights, in one role or both; nothing proves these, and nothing has to."""
    import onnx
    from onnx import numpy_helper

    folder.mkdir()
    changed = {}
    for name, path in artefacts.graphs.items():
        graph = onnx.load(path)
        if role in (None, name):
            for tensor in graph.graph.initializer:
                array = numpy_helper.to_array(tensor)
                if tensor.name.endswith("word_embeddings.weight"):
                    tensor.CopyFrom(numpy_helper.from_array(array[::-1].copy(), tensor.name))
                if tensor.name.startswith("predictor.head") and array.ndim == 2:
                    tensor.CopyFrom(numpy_helper.from_array(array / 20, tensor.name))
        changed[name] = folder / f"{name}.onnx"
        onnx.save(graph, changed[name])
    return replace(artefacts, manifest={**artefacts.manifest, "checkpoint_sha256": folder.name}, **changed)


@pytest.fixture(scope="module")
def models(artefacts, tmp_path_factory):
    """Name -> (artefacts, keys of its pipeline's answers): two models and the two mixtures of them."""
    folder = tmp_path_factory.mktemp("models")
    found = {
        "old": artefacts,
        "new": other_model(artefacts, folder / "new"),
        "selector new": other_model(artefacts, folder / "selector", "selector"),
        "predictor new": other_model(artefacts, folder / "predictor", "predictor"),
    }
    answers = {}
    for name, each in found.items():
        with Pipeline(write_repository(each, folder / f"{name} repository")) as pipeline:
            answers[name] = [key_of(answer) for answer in pipeline.predict(TEXTS)]
    return {name: (found[name], answers[name]) for name in found}


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """A function: name of a model -> the repository that is served, with that model exported over it."""
    root = tmp_path_factory.mktemp("exported") / "repository"
    return lambda name: write_repository(models[name][0], root, text_endpoint=True)


LINES = []
"""What the service reports."""


@pytest.fixture(autouse=True)
def lines():
    del LINES[:]
    return LINES


@pytest.fixture(scope="module")
def served(wheel, exported, tmp_path_factory):
    """A reloading and restarting server in a thread of its own."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr("rekd_deploy.server.service._DRAIN_SECONDS", 1.0)
        patch.setattr("rekd_deploy.server.service._FIRST_PAUSE", 0.1)
        server = TritonServer(exported("old"), 0, 0, 0, log_file=folder / "log", reload=True)
        ready, stopped, errors = threading.Event(), threading.Event(), []

        def work():
            try:
                Service(server, 5, LINES.append).run(ready.set, stopped)
            except BaseException as error:
                errors.append(error)
                ready.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert ready.wait(120) and not errors, errors
        yield server
        stopped.set()
        thread.join(60)
        assert not errors and not thread.is_alive()


@pytest.fixture
def load(served, models):
    """A function: tolerated errors -> six clients of three kinds."""
    makers = {name: keys for name, (_, keys) in models.items()}
    kinds = [
        partial(ensemble_client, served.grpc_url),
        partial(ensemble_client, served.http_url),
        partial(text_endpoint_client, served.grpc_url),
    ]
    return lambda *tolerated: Load(2 * kinds, TEXTS, makers, tolerated)


def ready_versions(server):
    with model_control(server.grpc_url, server.key) as call:
        index = call("get_model_repository_index").models
    return {(each.name, each.version) for each in index if each.state == "READY"}


def test_mixtures_could_be_told(models):
    keys = [keys for _, keys in models.values()]
    for index in range(len(TEXTS)):
        for one, other in combinations(keys, 2):
            assert not alike(one[index], other[index], tolerance=1e-3), (one[index], other[index])


def test_a_new_version_under_load(served, load, lines, exported):
    with load() as clients:
        exported("new")
        clients.wait_for(lambda: "version 1 has left" in lines)
        served.check_alive()
        gone = time.monotonic()
        clients.wait_for(lambda: clients.counts(gone)["new"] > 100)
    assert set(clients.counts()) == {"old", "new"} and not clients.surprises
    for responses in clients.responses:  # one connection never goes back
        makers = [response.maker for response in responses]
        assert makers == sorted(makers, reverse=True)
    names = ("rekd", "rekd_answer", "rekd_predictor", "rekd_prepare", "rekd_selector", "rekd_text")
    assert ready_versions(served) == {(name, "2") for name in names}
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
        monkeypatch.setattr(live_repository.LiveRepository, "place", damaging)
        exported("old")
        clients.wait_for(lambda: lines)
        refused = time.monotonic()
        clients.wait_for(lambda: clients.counts(refused)["new"] > 100)
        served.check_alive()
    monkeypatch.undo()
    assert set(clients.counts()) == {"new"} and not clients.surprises
    assert "load_model rekd_predictor" in lines[0] and "version 2 serves on" in lines[0] and len(lines) == 1
    assert {version for _, version in ready_versions(served)} == {"2"}


@pytest.mark.parametrize("victim", ["server", "process of a model"])
def test_killed_under_load(served, load, lines, victim):
    """Without the process of a model Triton would answer errors for ever and call itself ready."""
    first, ports, restarts = served.process_id, dict(served.ports), running_states()[0].restarts
    with load(ClientError, InferenceServerException) as clients:
        os.kill(first if victim == "server" else min(children_of(first)), signal.SIGKILL)
        clients.wait_for(lambda: "the server answers again" in lines)
        again = time.monotonic() + 2.0  # gRPC connects anew with a pause
        clients.wait_for(lambda: all(each[-1].at > again and each[-1].maker == "new" for each in clients.responses))
        clients.wait_for(lambda: clients.counts(again)["new"] > 10)  # and they go on
    assert served.process_id != first and served.ports == ports and not clients.surprises
    said = "killed by signal 9" if victim == "server" else "a process that runs one of the models has died"
    assert said in lines[0]
    unanswered = {"ServerUnavailableError", "InferenceServerException", "RejectedError"}
    assert {"new"} < set(clients.counts()) <= {"new", *unanswered}
    (state,) = running_states()
    assert (state.restarts, state.version) == (restarts + 1, 2)


def test_a_model_process_that_dies_during_an_exchange_is_noticed(served, lines, exported, monkeypatch):
    configure, before, killed = LiveRepository.configure, children_of(served.process_id), []

    def kill_and_configure(self, snapshot, name, beside=()):
        if not killed and (new := set(children_of(served.process_id)).difference(before)):  # of the first step
            killed.append(min(new))
            os.kill(killed[0], signal.SIGKILL)
        configure(self, snapshot, name, beside)

    monkeypatch.setattr(LiveRepository, "configure", kill_and_configure)
    exported("selector new")
    wait_until(lambda: "the server answers again" in lines, 120)
    assert lines[0].startswith("reloaded in") and "a process that runs one of the models has died" in lines[1], lines
    (state,) = running_states()
    assert read_status(served.http_url).versions == [state.version] == [served.live.current.version]


def test_the_key_opens_and_nothing_else_does(served):
    with model_control(served.grpc_url, "0" * 32) as call:
        with pytest.raises(ServerError, match="restricted|expecting header"):
            call("load_model", "rekd")
        with pytest.raises(ServerError):
            call("get_model_repository_index")
    with model_control(served.grpc_url, served.key) as call, pytest.raises(ServerError, match="nonesuch"):
        call("load_model", "nonesuch")
