"""From a checkpoint to a repository with engines, what runs them, and how they are verified, on a fake GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeDriver, FakeLibrary
from families import assert_same_answers
from test_verify import other_weights, sign

from rekd_deploy.cli.export_summary import verification_lines
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import EngineError, ParityError, RepositoryError, ServerError
from rekd_deploy.export import engines as export_engines
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.export.run import publish
from rekd_deploy.export.verify import verify
from rekd_deploy.parity.engines import prove_engines, reason_not_to_run
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import PREDICTOR, SELECTOR, SINGLE, ServingSettings, parameters_of, read_config
from rekd_deploy.repository.reader import PLAN, Exported, check_repository, graph_path, plan_path, read_manifest
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.runtimes import tensorrt_execution
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.tensorrt import PRODUCTS
from rekd_deploy.server.server import TritonServer
from rekd_train.files import sha256

pytestmark = pytest.mark.slow

MODELS = {"selector": SELECTOR, "predictor": PREDICTOR, "single": SINGLE}


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", lambda name: driver)
    return driver


@pytest.fixture
def library(driver, monkeypatch):
    library = FakeLibrary(driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    return library


# real engines of TensorRT-RTX


@pytest.fixture(scope="module")
def engine_repository(checkpoint, tmp_path_factory):
    """A repository with real engines. Do not change its files."""
    pytest.importorskip("tensorrt_rtx")
    root = tmp_path_factory.mktemp("engines") / "python"
    publish(checkpoint, root, engine="tensorrt-rtx", single_graph=True, batches=(1, 8), lengths=(16, 48))
    return root


@pytest.fixture
def gpu(engine_repository, library):
    """The fake GPU runs the repository's graphs for its real engines."""
    manifest = read_manifest(engine_repository)
    for role in MODELS:
        plan = plan_path(engine_repository, manifest, role).read_bytes()
        profiles = manifest["artefacts"][role]["engine"]["profiles"]
        library.plans[plan] = (str(graph_path(engine_repository, manifest, role)), profiles)
    return library.driver


@pytest.mark.tensorrt
def test_a_repository_with_engines_is_whole_and_says_what_they_are(engine_repository):
    manifest = check_repository(engine_repository)
    for role, model in MODELS.items():
        folder = engine_repository / model / "1"
        names = sorted(path.name for path in folder.iterdir())
        code = ["model.py", "tensorrt_execution.py", "triton_graphs.py"]
        assert names == ["model.onnx", "model.plan", *code]
        entry = manifest["artefacts"][role]["engine"]
        assert entry["sha256"] == sha256(folder / PLAN) == manifest["repository"]["files"][f"{model}/1/{PLAN}"]
        assert entry["graph_sha256"] == sha256(folder / "model.onnx") == manifest["artefacts"][role]["sha256"]
        assert (entry["precision"], entry["status"]) == ("fp32", "unverified")
        assert [profile["input_ids"][2] for profile in entry["profiles"]] == [[2, 16], [2, 48], [8, 16], [8, 48]]
        assert manifest["artefacts"][role]["fused"] == {}
        config = read_config(engine_repository / model / "config.pbtxt")
        assert (config.backend, config.max_batch_size) == ("python", 8)
        assert parameters_of(config)["engine"] == "tensorrt-rtx"
        assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_GPU]


@pytest.mark.tensorrt
@pytest.mark.parametrize("single_graph", [False, True])
def test_the_pipeline_on_engines_answers_as_on_graphs(engine_repository, gpu, texts, single_graph):
    with Pipeline(engine_repository, engine=True, single_graph=single_graph) as pipeline:
        answers = pipeline.predict(texts * 2)
        assert gpu.blocks
    assert not gpu.blocks
    with Pipeline(engine_repository) as pipeline:
        assert_same_answers(answers, pipeline.predict(texts * 2))


@pytest.mark.tensorrt
def test_the_model_inside_triton_runs_the_engine(engine_repository, gpu, artefacts):
    folder = engine_repository / SELECTOR / "1"
    specification = importlib.util.spec_from_file_location("engine_model", folder / "model.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    graphs, execution = (module.module_beside(folder, name) for name in ("triton_graphs", "tensorrt_execution"))
    graph = graphs.EngineGraph(folder, "tensorrt-rtx", 0, execution)
    inputs = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask")}
    found = graph.run(["mask", "scores"], inputs)
    with OnnxRuntimeRunner(folder / "model.onnx", artefacts.signature.selector, "it") as reference:
        expected = reference.run(inputs)
    np.testing.assert_array_equal(found[0], expected["mask"])
    np.testing.assert_array_equal(found[1], expected["scores"])
    graph.close()
    assert not gpu.blocks


# targets


@pytest.fixture
def with_engines(artefacts):
    """The tiny artefacts as if engines of a product had been built."""

    def made(product: str, **request):
        planned = plan_engines(artefacts, PRODUCTS[product], EngineRequest(**request))
        manifest = json.loads(json.dumps(planned.manifest))
        return replace(planned, engines=dict.fromkeys(planned.engines, artefacts.selector), manifest=manifest)

    return made


def test_triton_s_own_onnx_runtime_needs_the_graphs_alone(artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "onnxruntime", target="onnxruntime", threads=3)
    assert [path.name for path in (root / SELECTOR / "1").iterdir()] == ["model.onnx"]
    assert check_repository(root)["repository"]["target"] == "onnxruntime"
    with pytest.raises(ServerError, match="needs Triton's backend 'onnxruntime', and there is no"):
        TritonServer(root, 0, 0, 0).start()


def test_triton_s_own_tensorrt_gets_plans_and_may_choose_every_profile(with_engines, tmp_path):
    root = write_repository(with_engines("tensorrt", lengths=(16, 32)), tmp_path / "tensorrt", target="tensorrt")
    assert sorted(path.name for path in (root / SELECTOR / "1").iterdir()) == ["model.onnx", "model.plan"]
    check_repository(root)
    config = read_config(root / SELECTOR / "config.pbtxt")
    assert config.backend == "tensorrt" and not config.parameters
    assert list(config.instance_group[0].profile) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("product", "target"), [("tensorrt", "python"), ("tensorrt-rtx", "tensorrt"), ("tensorrt", "onnxruntime")]
)
def test_a_target_runs_no_engine_of_another_product(with_engines, product, target):
    with pytest.raises(RepositoryError, match=f"target '{target}' runs .* the export has {product}; fix: "):
        build_configs(with_engines(product), ServingSettings(), target)


def test_engines_that_are_not_there_are_said(artefacts, repository):
    with pytest.raises(RepositoryError, match="the export has none"):
        build_configs(artefacts, ServingSettings(), "tensorrt")
    with pytest.raises(RepositoryError, match=r"holds no engine of the selector; fix: .*--engine tensorrt-rtx"):
        Pipeline(repository, engine=True)


def test_sizes_that_do_not_fit_are_refused(artefacts, with_engines):
    with pytest.raises(RepositoryError, match="max_batch_size is 64, but the engine of the selector takes at most 32"):
        build_configs(with_engines("tensorrt", max_batch_size=32), ServingSettings(max_batch_size=64), "tensorrt")
    with pytest.raises(EngineError, match=r"length 49 is outside 3..48"):
        plan_engines(artefacts, PRODUCTS["tensorrt-rtx"], EngineRequest(lengths=(49,)))


@pytest.mark.parametrize(("lengths", "count"), [(None, 1), ((16, 48), 2)])
def test_an_engine_has_one_profile_unless_lengths_are_chosen(with_engines, lengths, count):
    profiles = with_engines("tensorrt", lengths=lengths).manifest["artefacts"]["selector"]["engine"]["profiles"]
    assert len(profiles) == count and profiles[-1]["input_ids"][1:] == [[8, 48], [64, 48]]


def test_without_tensorrt_the_engines_are_deferred_and_built_where_they_serve(
    checkpoint, artefacts, tmp_path, driver, monkeypatch
):
    root, driver.devices = tmp_path / "tensorrt", 0
    manifest = publish(checkpoint, root, target="tensorrt", batches=(1, 8), lengths=(16, 48)).manifest
    assert not list(root.rglob(PLAN))
    for role in ("selector", "predictor"):
        entry = manifest["artefacts"][role]["engine"]
        assert (entry["status"], entry["sha256"], entry["format"]) == ("unverified", None, "tensorrt")
        assert entry["graph_sha256"] == sha256(graph_path(root, manifest, role))
        config = read_config(root / MODELS[role] / "config.pbtxt")
        assert config.backend == "tensorrt" and len(config.instance_group[0].profile) == len(entry["profiles"])
    rows = np.array([[2, 5, 3], [2, -1, 3]])  # nothing of ours stands before Triton's tensorrt backend
    with OnnxRuntimeRunner(graph_path(root, manifest, "selector"), artefacts.signature.selector, "it") as selector:
        scores = selector.run({"input_ids": rows, "attention_mask": np.ones_like(rows)})["scores"]
    assert np.isfinite(scores[0]).all() and np.isnan(scores[1]).all()
    assert "selector engine unverified, not built yet: there is no GPU 0" in "\n".join(verification_lines(verify(root)))
    assert read_manifest(root) == manifest
    with pytest.raises(RepositoryError, match="not built yet; fix: rekd-export --verify"):
        Exported.of(root).engine_runner("selector")

    # on the target
    driver.devices, library = 1, FakeLibrary(driver, "10.9.0.34")
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    built = {}

    def build(_, graph, plan, signature, profiles, precision):
        built[graph] = (profiles, precision)
        plan.write_bytes(str(graph).encode())
        library.plans[plan.read_bytes()] = (str(graph), profiles)
        entry = next(e["engine"] for e in manifest["artefacts"].values() if e["sha256"] == sha256(graph))
        return {**entry, "version": library.__version__, "sha256": sha256(plan), "bytes": plan.stat().st_size,
                "built_for": ["the machine of the export"]}

    monkeypatch.setattr(export_engines, "build_engine", build)
    assert "verified on Fake RTX" in "\n".join(verification_lines(verify(root)))
    now = check_repository(root)
    for role in ("selector", "predictor"):
        entry = now["artefacts"][role]["engine"]
        assert (entry["status"], entry["version"]) == ("verified", "10.9.0.34")
        assert now["repository"]["files"][f"{MODELS[role]}/1/{PLAN}"] == entry["sha256"]
        profiles, precision = built[graph_path(root, now, role)]
        assert json.loads(json.dumps(profiles)) == entry["profiles"] and precision == "fp32"
    built.clear()
    verify(root)
    assert not built, "what is built is not built again"


# where there is a GPU


@pytest.fixture
def built(artefacts, with_engines, library, tmp_path):
    """Artefacts whose engines the fake GPU runs."""
    made = with_engines("tensorrt-rtx")
    entries, plans = made.manifest["artefacts"], {}
    for role, graph in made.graphs.items():
        plans[role] = tmp_path / f"{role}.plan"
        plans[role].write_bytes(role.encode())
        library.plans[role.encode()] = (str(graph), entries[role]["engine"]["profiles"])
        entries[role]["engine"] |= {
            "version": library.__version__, "built_for": ["sm89"], "precision": "fp32",
            "status": "unverified", "bytes": len(role), "sha256": sha256(plans[role]), "graph_sha256": sha256(graph),
        }  # fmt: skip
    return replace(made, engines=plans)


def entry_of(artefacts, role="selector"):
    return artefacts.manifest["artefacts"][role]["engine"]


def test_engines_that_can_run_are_verified_before_they_are_published(built):
    proved = prove_engines(built)
    for role in ("selector", "predictor"):
        entry = entry_of(proved, role)
        assert (entry["status"], entry["gpu"]) == ("verified", "Fake RTX (sm89)")
        assert entry_of(built, role)["status"] == "unverified"


def test_an_engine_that_answers_otherwise_is_not_published(built, library, tmp_path):
    graph = onnx.load(built.predictor)
    bias = next(weight for weight in graph.graph.initializer if weight.name == "predictor.head.1.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
    onnx.save(graph, tmp_path / "other.onnx")
    library.plans[b"predictor"] = (str(tmp_path / "other.onnx"), library.plans[b"predictor"][1])
    with pytest.raises(ParityError, match="the predictor's engine is not the model and is not published: a class"):
        prove_engines(built)


def test_engines_that_cannot_run_here_stay_unverified(built, driver, tmp_path):
    entry_of(built, "predictor")["built_for"] = ["sm120"]
    assert prove_engines(built) is built
    assert reason_not_to_run(entry_of(built, "predictor")) == (
        "it was built for sm120, this machine's Fake RTX is sm89; fix: verify on such a card, or export again"
    )
    entry_of(built, "predictor")["built_for"] = ["sm89"]
    driver.devices = 0
    assert prove_engines(built) is built
    root = write_repository(built, tmp_path / "python")
    with pytest.raises(ServerError, match="engines, and that of the selector cannot run here: there is no GPU 0"):
        TritonServer(root, 0, 0, 0).start()


# --verify


@pytest.fixture
def root(built, tmp_path):
    return write_repository(built, tmp_path / "r")


def status(root, role="selector"):
    return read_manifest(root)["artefacts"][role]["engine"]["status"]


def test_on_a_gpu_engines_run_and_the_manifest_is_completed(root):
    verification = verify(root)
    assert verification.engines["selector"].agreement.score_difference < 1e-4
    assert verification.engines["predictor"].agreement.compared_classes > 20
    assert status(root) == status(root, "predictor") == "verified"
    assert "verified on Fake RTX" in "\n".join(verification_lines(verification))
    assert json.loads(json.dumps(verification.to_dict()))["engines"]["selector"]["gpu"].startswith("Fake RTX")
    before = (root / "manifest.json").stat().st_mtime_ns
    verify(root)
    assert (root / "manifest.json").stat().st_mtime_ns == before


def test_engines_run_on_the_gpu_that_is_named(root, driver, monkeypatch):
    monkeypatch.setattr("rekd_deploy.export.verify.check_device", lambda device: None)  # of ONNX Runtime
    manifest = read_manifest(root)
    manifest["parity"]["emulated"] = True  # so that the engines alone are run
    (root / "manifest.json").write_text(json.dumps(manifest))
    driver.devices = 1
    assert "GPU 1" in verify(root, device="cuda:1").engines["selector"].reason
    driver.devices = 2
    assert verify(root, device="cuda:1").engines["selector"].agreement.rows > 20


def test_without_a_gpu_they_stay_unverified_and_it_is_said(root, driver):
    driver.devices = 0
    verification = verify(root)
    assert status(root) == "unverified" and set(verification.graphs) == {"selector", "predictor"}
    assert "selector engine unverified: there is no GPU 0" in "\n".join(verification_lines(verification))


@pytest.mark.parametrize("devices", [0, 1])
def test_a_stale_engine_is_named_with_and_without_a_gpu(root, driver, devices):
    driver.devices, manifest = devices, read_manifest(root)
    manifest["artefacts"]["predictor"]["engine"]["graph_sha256"] = "0" * 64
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RepositoryError, match=r"rekd_predictor/1/model.plan is stale"):
        verify(root)


def test_an_engine_of_another_checkpoint_answers_otherwise(root, library, artefacts, tmp_path):
    other = shutil.copyfile(artefacts.selector, tmp_path / "other.onnx")
    other_weights(other)
    library.plans[b"selector"] = (str(other), library.plans[b"selector"][1])
    with pytest.raises(RepositoryError, match=r"rekd_selector/1/model.plan does not answer.*a selector score differs"):
        verify(root)
    assert status(root) == "unverified"


def test_an_altered_engine_is_named(root):
    (root / "rekd_selector/1/model.plan").write_bytes(b"other")
    with pytest.raises(RepositoryError, match=r"rekd_selector/1/model.plan changed"):
        verify(root)
    sign(root, "rekd_selector/1/model.plan")
    with pytest.raises(RepositoryError, match=r"model.plan was altered"):
        verify(root)
