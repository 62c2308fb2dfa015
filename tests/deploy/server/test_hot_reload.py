"""What a reloading server reads, which export may take another's place, and the exchange with a list for Triton."""

import errno
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import contents, raising
from families import another

from rekd_deploy import RepositoryError, ServerError
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import CONFIG_FILE, ServingSettings, read_config
from rekd_deploy.repository.manifest import differing_fields
from rekd_deploy.repository.reader import read_manifest
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server import live_repository, service
from rekd_deploy.server.live_repository import LiveRepository, Snapshot, reasons_not_to_exchange
from rekd_deploy.server.service import HotReload

MODELS = ("rekd", "rekd_selector", "rekd_predictor")


@pytest.fixture
def export(artefacts, tmp_path):
    """A function: number -> the repository with one more export, which differs by that number."""
    root = tmp_path / "exported"
    return lambda number, **settings: write_repository(another(artefacts, number), root, **settings)


@pytest.fixture
def live(export):
    live = LiveRepository(export(1))
    live.prepare()
    yield live
    live.close()


def versions_of(config):
    return list(config.version_policy.specific.versions)


def served(live):
    """Model -> versions that its configuration serves, and that lie there."""
    found = {folder.name: folder for folder in live.models.iterdir()}
    lying = {name: sorted(int(each.name) for each in found[name].iterdir() if each.name.isdigit()) for name in found}
    return {name: (versions_of(read_config(found[name] / CONFIG_FILE)), lying[name]) for name in found}


def test_prepared_as_exported_but_with_the_newest_version_alone_which_no_later_export_changes(live, export):
    folder = live.models.parent
    for _ in range(2):
        live.close()
    assert not folder.exists() and live.current is None
    export(2, keep=2)
    root, manifest = live.prepare()
    assert root != live.repository and manifest["repository"]["model_version"] == 2
    assert served(live) == dict.fromkeys(MODELS, ([2], [2]))
    steps = read_config(live.models / "rekd" / CONFIG_FILE).ensemble_scheduling.step
    assert [step.model_version for step in steps] == [2, 2]
    before = contents(live.models)
    export(3)
    assert live.published()["repository"]["model_version"] == 3
    shutil.rmtree(live.repository)
    assert live.published() is None
    assert contents(live.models) == before


def test_what_versions_share_follows_the_newest_and_an_exchange_while_it_is_read_is_noticed(live, export, monkeypatch):
    """Triton would load every version again; that it does not: test_triton_operations."""
    labels, warm_up = live.models / "rekd" / "labels.txt", live.models / "rekd_selector" / "warmup" / "input_ids-16"
    inode, content = warm_up.stat().st_ino, labels.read_bytes()
    labels.write_text("other")
    export(2)
    live.place(live.snapshot())
    assert warm_up.stat().st_ino == inode and labels.read_bytes() == content
    with monkeypatch.context() as patch, pytest.raises(RepositoryError, match="changed while it was read"):
        patch.setattr(live_repository.shutil, "copytree", lambda *_: export(2) and raising(FileNotFoundError())())
        live.snapshot()
    assert live.snapshot().version == 2


def snapshot(export, number, text_endpoint=True, **settings):
    root = export(number, text_endpoint=text_endpoint, **settings)
    found = Snapshot(root, read_manifest(root))
    assert found.configs, "read before the next export"
    return found


def test_other_batching_larger_requests_and_a_further_model_may_come_but_none_may_go(export):
    few, whole = snapshot(export, 1, text_endpoint=False), snapshot(export, 2)
    new = snapshot(export, 3, max_batch_size=128, preferred_batch_sizes=(4,), queue_delay_us=7, instances=2, threads=3)
    few.configs["rekd_selector"].parameters.pop("shortest_length")  # as an older version wrote it
    assert set(new.ensembles) == {"rekd"} and "rekd_text" in new.steps
    assert reasons_not_to_exchange(few, new) == reasons_not_to_exchange(whole, new) == []
    assert reasons_not_to_exchange(whole, few) == ["it lacks rekd_text"]


@pytest.mark.parametrize(("model", "change", "reason"), [
    ("rekd_predictor", lambda config: config.output[0].dims.append(3), "rekd_predictor differs in output"),
    ("rekd_text", lambda config: setattr(config, "backend", "other"), "rekd_text differs in backend"),
    ("rekd", lambda config: config.output[0].dims.append(3), "rekd differs in output"),
    ("rekd", lambda config: setattr(config, "max_batch_size", 32), "rekd takes 32 in a request, 64 until now"),
    ("rekd", lambda config: setattr(config.parameters["labels"], "string_value", '["good", "bad"]'), "its labels or"),
    ("rekd", lambda config: setattr(config.parameters["preprocessing_sha256"], "string_value", "0"), "its labels or"),
])  # fmt: skip
def test_what_clients_or_triton_rely_on_may_not_change(export, model, change, reason):
    old, new = snapshot(export, 1), snapshot(export, 2)
    change(new.configs[model])
    (found,) = reasons_not_to_exchange(old, new)
    assert reason in found


def test_a_single_graph_that_has_learnt_from_other_texts_by_another_rekd_may_come(artefacts):
    with_single = replace(artefacts, single=artefacts.predictor)
    old, new = (build_configs(with_single, ServingSettings(), "python")["rekd_single"] for _ in range(2))
    for name in ("familiarity", "rekd_version", "budget"):
        new.parameters[name].string_value += "other"
    assert differing_fields(old, new) == []
    new.parameters["tokenizer"].string_value += "other"
    assert differing_fields(old, new) == ["parameters"]


def test_a_full_disk_is_said_to_be_one(live, export, monkeypatch):
    export(2)
    def copy(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")
    defaults = [copy if each is shutil.copy2 else each for each in shutil.copytree.__defaults__]
    monkeypatch.setattr(shutil.copytree, "__defaults__", tuple(defaults))
    with pytest.raises(RepositoryError, match="has no room for a copy .*TMPDIR"):
        live.snapshot()
    assert [each.name for each in live.models.parent.iterdir() if each.is_dir()] == ["models", live.current.root.name]


class FakeServer:
    """What HotReload needs of a server, and the list; it loads what a model's folder says."""

    grpc_url, key = "nowhere", "key"

    def __init__(self, live):
        self.live, self.lines = live, []
        self.done, self.broken, self.dead, self.silent = [], set(), False, 0
        self.busy = set()  # models and versions that still have a request
        self.loaded = {name: [1] for name in live.current.configs}
        self.reload = HotReload(self, self.lines.append)

    @contextmanager
    def control(self, *place):
        assert place == (self.grpc_url, self.key)
        yield lambda method, *arguments: getattr(self, method)(*arguments)

    def check_alive(self):
        if self.dead:
            raise ServerError("it is dead")

    def load_model(self, model):
        versions = versions_of(read_config(self.live.models / model / CONFIG_FILE))
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
        states |= dict.fromkeys(self.busy, "UNLOADING") | {("gone", 1): "UNAVAILABLE", ("rekd_beside", 1): "READY"}
        each = ({"name": name, "version": str(version), "state": state} for (name, version), state in states.items())
        return SimpleNamespace(models=[SimpleNamespace(**one) for one in each])


@pytest.fixture
def server(live, monkeypatch):
    server = FakeServer(live)
    monkeypatch.setattr(service, "model_control", server.control)
    monkeypatch.setattr(service, "_DRAIN_SECONDS", 0.0)
    return server


def test_steps_before_the_ensemble_and_the_old_ones_last(server, export, monkeypatch):
    for _ in range(2):
        assert not server.reload.poll() and server.done == server.lines == []
        export(1)
    export(2)
    monkeypatch.setattr(service, "_DRAIN_SECONDS", 1000.0)
    assert server.reload.poll()
    assert server.done == [("rekd_selector", 1, 2), ("rekd_predictor", 1, 2), ("rekd", 2)]
    assert "version 2 answers" in server.lines[0] and server.live.current.version == 2
    assert not server.reload.poll() and len(server.done) == 3, "requests that have begun have time"
    monkeypatch.setattr(service, "_DRAIN_SECONDS", 0.0)
    for _ in range(3):
        assert not server.reload.poll()
    assert sorted(server.done[3:]) == [("rekd_predictor", 2), ("rekd_selector", 2)]
    assert server.lines[1:] == ["version 1 has left"]
    files = sorted(path.name for path in (server.live.models / "rekd_selector").iterdir())
    assert files == ["2", CONFIG_FILE, "warmup"]


def test_the_old_one_stays_while_it_has_a_request_and_silence_is_no_death(server, export):
    export(2)
    server.reload.poll()
    server.silent = 2
    for _ in range(2):
        server.reload.poll()
    assert server.lines[1:] == ["version 1 has not left yet: Deadline Exceeded"], "said once"
    export(3)
    for busy, loaded in (({("rekd", 1)}, [1, 2]), (set(), [2]), ({("rekd_selector", 1)}, [2])):
        server.busy = busy
        server.reload.poll()
        assert server.loaded["rekd_selector"] == loaded
    assert len(server.lines) == 2 and (server.live.models / "rekd_selector" / "1").is_dir()
    server.busy = set()
    server.reload.poll()
    assert server.lines[2:] == ["version 1 has left"]
    server.reload.poll()
    assert server.loaded == {"rekd": [3], "rekd_selector": [2, 3], "rekd_predictor": [2, 3]}
    server.dead, server.silent = True, 1
    with pytest.raises(ServerError, match="it is dead"):
        server.reload.poll()


@pytest.mark.parametrize("model", [*MODELS, "a full disk"])
def test_what_does_not_load_leaves_everything_as_it_was(server, export, model, monkeypatch):
    server.broken, reason = {(model, 2)}, f"no luck with {model}"
    with monkeypatch.context() as patch:
        if model not in MODELS:
            server.broken, reason = set(), "no room"
            patch.setattr(server.live, "place", raising(OSError("no room")))
        export(2, text_endpoint=True)
        for _ in range(2):  # it is not tried again
            assert not server.reload.poll()
    assert server.lines == [f"not reloaded: {reason}; version 1 serves on"]
    assert server.loaded == dict.fromkeys(MODELS, [1])
    assert not list(server.live.models.glob("*/2")) and len(list(server.live.models.glob("*/1"))) == 3
    server.broken = set()
    export(3)
    server.reload.poll()
    assert server.loaded["rekd"] == [3]


def test_a_full_disk_while_it_is_loaded_or_brought_back_ends_nothing(server, export, monkeypatch):
    configure, written = server.live.configure, []
    def full(snapshot, name, beside=()):
        written.append(name)
        if len(written) in full_at:
            raise OSError("no room")
        configure(snapshot, name, beside)
    monkeypatch.setattr(server.live, "configure", full)
    full_at = {2}
    export(2)
    assert not server.reload.poll() and server.lines == ["not reloaded: no room; version 1 serves on"]
    assert written[2:] == ["rekd_selector", "rekd_predictor"] and server.loaded == dict.fromkeys(MODELS, [1])
    written.clear()
    full_at = {2, 3}
    export(3)
    with pytest.raises(ServerError, match="version 1 cannot be brought back: no room"):
        server.reload.poll()  # the service starts it again
    assert not list(server.live.models.glob("*/3"))
    written.clear()
    full_at = {4}
    export(4)
    assert server.reload.poll() and not server.reload.poll()
    assert server.lines[-1] == "version 1 has not left yet: no room"
    for _ in range(3):
        server.reload.poll()
    assert server.lines[-1] == "version 1 has left"


def test_one_that_is_not_whole_newer_or_of_a_taken_number_waits(server, export, monkeypatch, tmp_path):
    shutil.rmtree(server.live.repository)
    assert not server.reload.poll() and server.lines == []
    export(5)
    server.reload.poll()
    assert "it has the number 1 of the one that is served" in server.lines[0] and server.done == []
    assert served(server.live) == dict.fromkeys(MODELS, ([1], [1]))
    export(2)
    graph = server.live.repository / "rekd_selector" / "2" / "model.onnx"
    graph.rename(tmp_path / "later")
    for _ in range(2):
        assert not server.reload.poll()
    assert len(server.lines) == 2 and "not reloaded yet" in server.lines[1] and "missing" in server.lines[1]
    (tmp_path / "later").rename(graph)
    with monkeypatch.context() as patch:
        patch.setattr(service, "reasons_not_to_exchange", raising(RepositoryError("of a newer rekd")))
        assert not server.reload.poll()
    assert server.lines[2:] == ["not reloaded yet: of a newer rekd"] and server.done == []
    assert server.reload.poll() and server.live.current.version == 2, "it is tried again"


@pytest.mark.parametrize("when", ["while it is loaded", "during the farewell"])
def test_a_restart_takes_up_what_was_served_last(server, export, when):
    if when == "while it is loaded":
        server.broken, server.dead = {("rekd_selector", 2)}, True
    export(2)
    with pytest.raises(ServerError, match="it is dead") if server.dead else nullcontext():
        server.reload.poll()
    server.live.prepare()
    server.reload.restarted()
    server.done.clear()
    version, copies = server.live.current.version, [path.name for path in server.live.models.parent.glob("[0-9]")]
    assert version == (1 if server.dead else 2) and len(copies) == 1
    assert served(server.live) == dict.fromkeys(MODELS, ([version], [version]))
    assert not server.reload.poll() and server.done == [] and len(server.lines) == 1, "it is not tried again"
