"""The order of an exchange, and what is done when it goes wrong, with a list in Triton's place."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rekd_deploy.errors import RepositoryError, ServerError
from rekd_deploy.repository.config import CONFIG_FILE, read_config
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server import service
from rekd_deploy.server.live_repository import LiveRepository
from rekd_deploy.server.service import HotReload


class FakeServer:
    """What HotReload needs of a server, and the list; it loads what a model's folder says."""

    grpc_url, key = "nowhere", "key"

    def __init__(self, repository):
        self.live = LiveRepository(repository)
        self.live.prepare()
        self.done, self.broken, self.dead, self.silent = [], set(), False, 0
        self.busy = set()
        """Models and versions that still have a request."""
        self.loaded = {name: [self.live.current.version] for name in self.live.current.configs}

    def check_alive(self):
        if self.dead:
            raise ServerError("it is dead")

    def load_model(self, model):
        versions = list(read_config(self.live.models / model / CONFIG_FILE).version_policy.specific.versions)
        self.done.append((model, *versions))
        if any((model, version) in self.broken for version in versions):
            raise ServerError(f"no luck with {model}")
        self.loaded[model] = versions

    def unload_model(self, model):
        self.loaded.pop(model, None)

    def get_model_repository_index(self):
        if self.silent:
            self.silent -= 1
            raise ServerError("Deadline Exceeded")
        states = {(name, version): "READY" for name, versions in self.loaded.items() for version in versions}
        states |= dict.fromkeys(self.busy, "UNLOADING")
        models = [SimpleNamespace(name=n, version=str(v), state=state) for (n, v), state in states.items()]
        return SimpleNamespace(models=[*models, SimpleNamespace(name="gone", version="1", state="UNAVAILABLE")])


@pytest.fixture
def export(artefacts, tmp_path):
    """A function: number -> the repository with one more export, which differs by that number."""
    root = tmp_path / "exported"

    def exported(number, **settings):
        named = replace(artefacts, manifest={**artefacts.manifest, "checkpoint_sha256": f"{number:064}"})
        return write_repository(named, root, **settings)

    return exported


@pytest.fixture
def server(export, monkeypatch):
    server = FakeServer(export(1))

    @contextmanager
    def control(grpc_url, key):
        assert (grpc_url, key) == (server.grpc_url, server.key)
        yield lambda method, *arguments: getattr(server, method)(*arguments)

    monkeypatch.setattr(service, "model_control", control)
    monkeypatch.setattr(service, "_DRAIN_SECONDS", 0.0)
    yield server
    server.live.close()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def reload(server, lines):
    return HotReload(server, lines.append)


def test_nothing_new_nothing_done(server, reload, export, lines):
    assert not reload.poll()
    export(1)
    assert not reload.poll()
    assert server.done == [] and lines == []


def test_steps_before_the_ensemble_and_the_old_ones_last(server, reload, export, lines, monkeypatch):
    export(2)
    monkeypatch.setattr(service, "_DRAIN_SECONDS", 1000.0)
    assert reload.poll()
    assert server.done == [("rekd_selector", 1, 2), ("rekd_predictor", 1, 2), ("rekd", 2)]
    assert "version 2 answers" in lines[0] and server.live.current.version == 2
    assert not reload.poll() and len(server.done) == 3, "requests that have begun have time"
    monkeypatch.setattr(service, "_DRAIN_SECONDS", 0.0)
    assert not reload.poll()
    assert sorted(server.done[3:]) == [("rekd_predictor", 2), ("rekd_selector", 2)]
    reload.poll()
    assert lines[1:] == ["version 1 has left"]
    files = sorted(path.name for path in (server.live.models / "rekd_selector").iterdir())
    assert files == ["2", CONFIG_FILE, "warmup"]
    reload.poll()
    assert len(server.done) == 5


def test_the_old_one_stays_while_a_request_is_in_it(server, reload, export, lines):
    export(2)
    reload.poll()
    export(3)
    server.busy = {("rekd", 1)}
    reload.poll()
    assert server.loaded["rekd_selector"] == [1, 2]
    server.busy = set()
    reload.poll()
    assert server.loaded["rekd_selector"] == [2]
    server.busy = {("rekd_selector", 1)}
    reload.poll()
    assert len(lines) == 1 and (server.live.models / "rekd_selector" / "1").is_dir()
    server.busy = set()
    reload.poll()
    assert lines[1:] == ["version 1 has left"]
    reload.poll()
    assert server.loaded == {"rekd": [3], "rekd_selector": [2, 3], "rekd_predictor": [2, 3]}


@pytest.mark.parametrize("model", ["rekd_selector", "rekd_predictor", "rekd"])
def test_what_does_not_load_leaves_everything_as_it_was(server, reload, export, lines, model):
    server.broken = {(model, 2)}
    export(2, text_endpoint=True)
    reload.poll()
    assert lines == [f"not reloaded: no luck with {model}; version 1 serves on"]
    assert server.loaded == {"rekd": [1], "rekd_selector": [1], "rekd_predictor": [1]}
    assert not list(server.live.models.glob("*/2")) and len(list(server.live.models.glob("*/1"))) == 3
    reload.poll()
    assert len(lines) == 1, "it is not tried again"
    server.broken = set()
    export(3)
    reload.poll()
    assert server.loaded["rekd"] == [3]


def test_a_full_disk_leaves_everything_as_it_was(server, reload, export, lines, monkeypatch):
    def full(snapshot):
        raise OSError("no room")

    monkeypatch.setattr(server.live, "place", full)
    export(2)
    assert not reload.poll()
    assert lines == ["not reloaded: no room; version 1 serves on"] and server.loaded["rekd"] == [1]


def test_silence_for_a_moment_is_no_death(server, reload, export, lines):
    export(2)
    reload.poll()
    server.silent = 2
    for _ in range(2):
        reload.poll()
    assert lines[1:] == ["version 1 has not left yet: Deadline Exceeded"], "said once"
    assert server.loaded["rekd_selector"] == [1, 2]
    server.dead, server.silent = True, 1
    with pytest.raises(ServerError, match="it is dead"):
        reload.poll()


def test_what_is_not_whole_yet_is_looked_at_again(server, reload, export, lines, tmp_path):
    export(2)
    graph = server.live.repository / "rekd_selector" / "2" / "model.onnx"
    graph.rename(tmp_path / "later")
    for _ in range(2):
        reload.poll()
    assert len(lines) == 1 and "not reloaded yet" in lines[0] and "missing" in lines[0] and server.done == []
    (tmp_path / "later").rename(graph)
    reload.poll()
    assert server.loaded["rekd"] == [2]


def test_an_export_of_a_kind_unknown_to_this_version_is_no_death(server, reload, export, lines, monkeypatch):
    def unknown(old, new):
        raise RepositoryError("of a newer rekd")

    monkeypatch.setattr(service, "reasons_not_to_exchange", unknown)
    export(2)
    for _ in range(2):
        assert not reload.poll()
    assert lines == ["not reloaded yet: of a newer rekd"] and server.done == []


def test_the_number_that_is_served_is_taken(server, reload, export, lines):
    shutil.rmtree(server.live.repository)
    reload.poll()
    assert lines == []
    export(5)
    reload.poll()
    assert len(lines) == 1 and "it has the number 1 of the one that is served" in lines[0] and server.done == []
    assert len(list(server.live.models.glob("*/1"))) == 3


def test_an_export_with_which_the_server_dies_is_left_alone(server, reload, export, lines):
    server.broken, server.dead = {("rekd_selector", 2)}, True
    export(2)
    with pytest.raises(ServerError, match="it is dead"):
        reload.poll()
    assert lines == ["not reloaded: no luck with rekd_selector; version 1 serves on"]
    server.live.prepare()
    reload.restarted()
    server.done.clear()
    assert not reload.poll() and server.done == [] and server.live.current.version == 1


def test_a_restart_during_the_farewell_ends_it(server, reload, export, lines):
    export(2)
    reload.poll()
    old = reload._leaving[0].root
    server.live.prepare()
    reload.restarted()
    assert not old.exists() and not list(server.live.models.glob("*/1"))
    reload.poll()
    assert len(lines) == 1
