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
from load import Load, alike, ask_ensemble, ask_raw_text, key_of

from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import ServerError
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.hot_reload import HotReload, ModelControl
from rekd_deploy.server.process import children_of
from rekd_deploy.server.server import TritonServer
from rekd_deploy.server.service import RestartPolicy, Service, running_states
from rekd_deploy.server.status import read_status

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


@pytest.fixture(scope="module")
def lines():
    """What the service says."""
    return []


@pytest.fixture(scope="module")
def served(wheel, exported, lines, tmp_path_factory):
    """A reloading and restarting server in a thread of its own."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        server = TritonServer(exported("old"), 0, 0, 0, log_file=folder / "log", reload=True)
        service = Service(
            server, RestartPolicy(first_pause=0.1), HotReload(server, 1.0, lines.append), lines.append
        )
        ready, stopped, errors = threading.Event(), threading.Event(), []

        def work():
            try:
                service.run(ready.set, stopped)
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
        partial(ask_ensemble, served.grpc_url),
        partial(ask_ensemble, served.http_url),
        partial(ask_raw_text, served.grpc_url),
    ]
    return lambda **settings: Load(2 * kinds, TEXTS, makers, **settings)


def test_mixtures_could_be_told(models):
    keys = [keys for _, keys in models.values()]
    for index in range(len(TEXTS)):
        for one, other in combinations(keys, 2):
            assert not alike(one[index], other[index], tolerance=1e-3), (one[index], other[index])


def test_a_new_version_under_load(served, load, lines, exported):
    with load(tolerated=()) as asked:
        exported("new")
        asked.wait_for(lambda: "version 1 has left" in lines)
        served.check_alive()
        gone = time.monotonic()
        asked.wait_for(lambda: asked.answered_after(gone)["new"] > 100)
    assert set(asked.counts()) == {"old", "new"} and not asked.surprises
    for answers in asked.answers:  # one connection never goes back
        makers = [answer.maker for answer in answers]
        assert makers == sorted(makers, reverse=True)
    with ModelControl(served.grpc_url, served.key) as control:
        states = control.states()
        assert set(states) == {"rekd", "rekd_answer", "rekd_predictor", "rekd_prepare", "rekd_selector", "rekd_text"}
        assert all(versions == {2: "READY"} for versions in states.values())
    started = served.log_file.read_text().count("ModelInstanceInitialize: rekd_selector")
    assert started == 2  # once for each version: the old one was not loaded again beside itself
    status = read_status(served.http_url, running_states())
    assert status.ready and status.versions == (2,) and status.running.version == 2


def test_a_version_that_does_not_load_is_refused_under_load(served, load, lines, exported, models, monkeypatch):
    del lines[:]
    with load(tolerated=()) as asked:
        from rekd_deploy.server import live_repository

        place = live_repository.LiveRepository.place

        def damaging(self, snapshot):
            place(self, snapshot)
            graph = self.models / "rekd_predictor" / str(snapshot.version) / "model.onnx"
            graph.unlink()
            graph.write_bytes(b"no graph")

        monkeypatch.setattr(live_repository.LiveRepository, "place", damaging)
        exported("old")
        asked.wait_for(lambda: any(line.startswith("not reloaded") for line in lines))
        refused = time.monotonic()
        asked.wait_for(lambda: asked.answered_after(refused)["new"] > 100)
        served.check_alive()
    monkeypatch.undo()
    assert set(asked.counts()) == {"new"} and not asked.surprises
    assert "did not load rekd_predictor" in lines[0] and "version 2 serves on" in lines[0] and len(lines) == 1
    assert read_status(served.http_url).ready
    with ModelControl(served.grpc_url, served.key) as control:
        assert all(versions == {2: "READY"} for versions in control.states().values())


def test_a_version_that_clients_could_not_follow_is_refused(served, lines, exported, models, tmp_path):
    del lines[:]
    root = write_repository(models["new"][0], served.repository, max_batch_size=32, preferred_batch_sizes=(8,))
    until = time.monotonic() + 20
    while not lines and time.monotonic() < until:
        time.sleep(0.05)
    assert root == served.repository and len(lines) == 1
    for part in ("lacks rekd_answer, rekd_prepare, rekd_text", "32 in a request, 64 until now", "version 2 serves on"):
        assert part in lines[0]
    served.check_alive()


def test_killed_under_load(served, load, lines):
    del lines[:]
    first, ports = served.process_id, dict(served.ports)
    from tritonclient.utils import InferenceServerException

    from rekd_deploy.errors import ClientError

    with load(tolerated=(ClientError, InferenceServerException)) as asked:
        os.kill(first, signal.SIGKILL)
        asked.wait_for(lambda: "the server answers again" in lines)
        again = time.monotonic() + 2.0  # gRPC connects anew with a pause
        asked.wait_for(lambda: all(answers[-1].at > again and answers[-1].maker == "new" for answers in asked.answers))
        asked.wait_for(lambda: asked.answered_after(again)["new"] > 10)  # and they go on
    assert served.process_id != first and served.ports == ports
    errors = set(asked.counts()) - {"new"}
    assert errors and errors <= {"ServerUnavailableError", "InferenceServerException"} and not asked.surprises
    (state,) = running_states()
    assert state.restarts == 1 and state.version == 2


def test_a_model_process_killed_under_load(served, load, lines):
    """Triton would answer errors for ever and call itself ready; the service starts it again."""
    del lines[:]
    from tritonclient.utils import InferenceServerException

    from rekd_deploy.errors import ClientError

    with load(tolerated=(ClientError, InferenceServerException)) as asked:
        os.kill(min(children_of(served.process_id)), signal.SIGKILL)
        asked.wait_for(lambda: "the server answers again" in lines)
        again = time.monotonic() + 2.0
        asked.wait_for(lambda: all(answers[-1].at > again and answers[-1].maker == "new" for answers in asked.answers))
    assert "a process that runs one of the models has died" in lines[0]
    assert "nobody" not in asked.counts() and "old" not in asked.counts() and not asked.surprises


def test_a_model_process_that_dies_during_an_exchange_is_noticed(served, lines, exported, monkeypatch):
    del lines[:]
    monkeypatch.setattr("rekd_deploy.server.server._SETTLE_SECONDS", 3.0)
    load, killed = ModelControl.load, []

    def load_and_kill(control, model):
        load(control, model)
        if not killed:
            killed.append(min(children_of(served.process_id)))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(ModelControl, "load", load_and_kill)
    exported("selector new")
    until = time.monotonic() + 120
    while "the server answers again" not in lines and time.monotonic() < until:
        time.sleep(0.1)
    assert lines[0].startswith("reloaded in") and "a process that runs one of the models has died" in lines[1], lines
    (state,) = running_states()
    assert read_status(served.http_url).versions == (state.version,) == (served.live.current.version,)


def test_the_key_opens_and_nothing_else_does(served):
    with ModelControl(served.grpc_url, "0" * 32) as control:
        with pytest.raises(ServerError, match="restricted|expecting header"):
            control.load("rekd")
        with pytest.raises(ServerError):
            control.states()
    with ModelControl(served.grpc_url, served.key) as control, pytest.raises(ServerError, match="nonesuch"):
        control.load("nonesuch")
