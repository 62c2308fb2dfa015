"""The order of an exchange, and what is done when it goes wrong, with a list in Triton's place."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from rekd_deploy.errors import ServerError
from rekd_deploy.repository.config import CONFIG_FILE, read_config
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server import hot_reload
from rekd_deploy.server.hot_reload import HotReload
from rekd_deploy.server.live_repository import LiveRepository
from rekd_deploy.server.server import TritonServer


class FakeServer:
    """What HotReload needs of a server, and the list."""

    grpc_url, key = "nowhere", "key"

    def __init__(self, repository):
        self.live = LiveRepository(repository)
        self.live.prepare()
        self.done, self.broken, self.dead, self.busy, self.silent = [], set(), False, set(), 0
        self.loaded = {name: [self.live.current.version] for name in self.live.current.configs}

    def check_alive(self):
        if self.dead:
            raise ServerError("it is dead")

    check_running = check_alive

    def watch_models(self, change, certain=True):
        assert certain
        self.done.append(f"{change:+} processes")


class FakeControl:
    """Loads what a model's folder says."""

    server: FakeServer

    def __init__(self, grpc_url, key):
        assert (grpc_url, key) == (FakeServer.grpc_url, FakeServer.key)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def load(self, model):
        versions = list(read_config(self.server.live.models / model / CONFIG_FILE).version_policy.specific.versions)
        self.server.done.append((model, *versions))
        if any((model, version) in self.server.broken for version in versions):
            raise ServerError(f"no luck with {model}")
        self.server.loaded[model] = versions

    def unload(self, model):
        self.server.done.append(("unload", model))
        self.server.loaded.pop(model, None)

    def states(self):
        if self.server.silent:
            self.server.silent -= 1
            raise ServerError("the server does not list its models: Deadline Exceeded")
        found = {name: dict.fromkeys(versions, "READY") for name, versions in self.server.loaded.items()}
        for name, version in self.server.busy:
            found[name][version] = "UNLOADING"
        return found


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
    FakeControl.server = server
    monkeypatch.setattr(hot_reload, "ModelControl", FakeControl)
    yield server
    server.live.close()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def reload(server, lines):
    return HotReload(server, drain_seconds=0.0, report=lines.append)


def test_only_a_server_for_it(repository):
    with pytest.raises(ServerError, match="not started for reloading"):
        HotReload(TritonServer(repository))


def test_nothing_new_nothing_done(server, reload, export, lines):
    reload.poll()
    export(1)
    reload.poll()
    assert server.done == [] and lines == []


def test_members_before_the_ensemble_and_the_old_ones_last(server, reload, export, lines):
    export(2)
    reload.poll()
    assert server.done == [("rekd_selector", 1, 2), ("rekd_predictor", 1, 2), ("rekd", 2), "+2 processes"]
    assert "version 2 answers" in lines[0] and server.live.current.version == 2
    reload.poll()
    assert server.done[4:] == [("rekd_selector", 2), "-1 processes", ("rekd_predictor", 2), "-1 processes"]
    assert sorted(folder.name for folder in (server.live.models / "rekd_selector").iterdir()) == [
        "2", CONFIG_FILE, "warmup",
    ]  # fmt: skip
    assert lines[1:] == ["version 1 has left"]
    reload.poll()
    assert len(server.done) == 8


def test_the_old_one_stays_while_a_request_is_in_its_ensemble(server, reload, export, lines):
    export(2)
    reload.poll()
    server.busy = {("rekd", 1)}
    export(3)
    reload.poll()
    assert server.loaded["rekd_selector"] == [1, 2] and len(lines) == 1
    server.busy = set()
    reload.poll()
    assert server.loaded["rekd_selector"] == [2]
    reload.poll()
    assert server.loaded == {"rekd": [3], "rekd_selector": [2, 3], "rekd_predictor": [2, 3]}


def test_the_old_one_stays_for_a_while(server, export):
    reload = HotReload(server, drain_seconds=1000.0)
    export(2)
    reload.poll()
    reload.poll()
    assert server.loaded["rekd_selector"] == [1, 2]


@pytest.mark.parametrize("model", ["rekd_selector", "rekd_predictor", "rekd"])
def test_what_does_not_load_leaves_everything_as_it_was(server, reload, export, lines, model):
    before = {path.relative_to(server.live.models) for path in server.live.models.rglob("*")}
    server.broken = {(model, 2)}
    export(2, text_endpoint=True)
    reload.poll()
    assert lines == [f"not reloaded: no luck with {model}; version 1 serves on"]
    assert server.loaded == {"rekd": [1], "rekd_selector": [1], "rekd_predictor": [1]}
    assert {path.relative_to(server.live.models) for path in server.live.models.rglob("*")} == before
    reload.poll()
    assert len(lines) == 1
    server.broken = set()
    export(3)
    reload.poll()
    assert server.loaded["rekd"] == [3]


def test_silence_for_a_moment_is_no_death(server, reload, export, lines):
    export(2)
    reload.poll()
    server.silent = 2
    for _ in range(2):
        reload.poll()
    assert lines[1:] == ["version 1 has not left yet: the server does not list its models: Deadline Exceeded"]
    assert server.loaded["rekd_selector"] == [1, 2]
    reload.poll()
    assert server.loaded["rekd_selector"] == [2] and lines[2:] == ["version 1 has left"]


def test_silence_while_the_old_one_leaves_is_no_death(server, reload, export, lines, monkeypatch):
    export(2)
    reload.poll()
    load = FakeControl.load

    def load_and_fall_silent(control, model):
        load(control, model)
        server.silent = 1

    monkeypatch.setattr(FakeControl, "load", load_and_fall_silent)
    reload.poll()
    assert lines[1:] == ["version 1 has left"]
    assert server.done[4:] == [("rekd_selector", 2), "-1 processes", ("rekd_predictor", 2), "-1 processes"]


def test_a_step_that_does_not_load_while_the_old_one_leaves_is_loaded_later(server, reload, export, lines):
    export(2)
    reload.poll()
    server.broken = {("rekd_predictor", 2)}
    for _ in range(2):
        reload.poll()
    assert lines[1:] == ["version 1 has not left yet: no luck with rekd_predictor"]
    assert server.done.count("-1 processes") == 1, "the selector's old process was let go, once"
    server.broken = set()
    reload.poll()
    assert lines[2:] == ["version 1 has left"] and server.done.count("-1 processes") == 2


def test_a_death_while_the_old_one_leaves_is_one(server, reload, export):
    export(2)
    reload.poll()
    server.silent, server.dead = 1, True
    with pytest.raises(ServerError, match="it is dead"):
        reload.poll()


def test_silence_while_going_back_is_no_death(server, reload, export, lines):
    server.broken, server.silent = {("rekd", 2)}, 1
    export(2, text_endpoint=True)
    reload.poll()
    assert lines == ["not reloaded: no luck with rekd; version 1 serves on"]
    assert server.loaded == {"rekd": [1], "rekd_selector": [1], "rekd_predictor": [1]}


def test_processes_that_loading_has_replaced_are_no_death(server, reload, export, lines, monkeypatch):
    """Triton may run the old version in a process of its own anew when it loads another beside it."""

    def replaced():
        raise ServerError("a process that runs one of the models has died")

    monkeypatch.setattr(server, "check_alive", replaced)
    server.broken = {("rekd_predictor", 2)}
    export(2)
    reload.poll()
    assert lines == ["not reloaded: no luck with rekd_predictor; version 1 serves on"]


def test_what_is_not_whole_yet_is_looked_at_again(server, reload, export, lines, tmp_path):
    export(2)
    graph = server.live.repository / "rekd_selector" / "2" / "model.onnx"
    graph.rename(tmp_path / "later")
    reload.poll()
    reload.poll()
    assert len(lines) == 1 and "not reloaded yet" in lines[0] and "missing" in lines[0] and server.done == []
    (tmp_path / "later").rename(graph)
    reload.poll()
    assert server.loaded["rekd"] == [2]


def test_the_number_that_is_served_is_taken(server, reload, export, lines):
    shutil.rmtree(server.live.repository)
    reload.poll()
    assert lines == []
    export(5)
    reload.poll()
    assert len(lines) == 1 and "it has the number 1 of the one that is served" in lines[0] and server.done == []


def test_an_export_with_which_the_server_dies_twice_is_left_alone(server, reload, export, lines):
    server.broken, server.dead = {("rekd_selector", 2)}, True
    export(2)
    for _ in range(2):
        with pytest.raises(ServerError, match="it is dead"):
            reload.poll()
        server.live.prepare()
        reload.restarted()
    assert "died twice while it loaded version 2" in lines[0]
    server.done.clear()
    reload.poll()
    assert server.done == [] and server.live.current.version == 1


def test_a_death_by_chance_is_no_reason(server, reload, export, lines):
    server.broken, server.dead = {("rekd_selector", 2)}, True
    export(2)
    with pytest.raises(ServerError):
        reload.poll()
    server.live.prepare()
    reload.restarted()
    server.broken, server.dead = set(), False
    reload.poll()
    assert server.loaded["rekd"] == [2]
