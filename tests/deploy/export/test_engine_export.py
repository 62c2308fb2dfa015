"""From a checkpoint to a repository with engines, and what runs them, on a fake GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from config_rules import config_mistakes, engine_mistakes
from fake_tensorrt import FakeDriver, FakeLibrary
from families import assert_same_answers

from rekd_deploy.cli.export_summary import verification_lines
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import EngineError, ParityError, RepositoryError, ServerError
from rekd_deploy.export import engines as export_engines
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.export.run import publish
from rekd_deploy.export.verify import verify
from rekd_deploy.parity.engines import prove_engines, reason_not_to_run
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import (
    ENSEMBLE,
    PREDICTOR,
    SELECTOR,
    SINGLE,
    ServingSettings,
    parameters_of,
    read_config,
)
from rekd_deploy.repository.reader import PLAN, Exported, check_repository, graph_path, plan_path, read_manifest
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.tensorrt import execution as tensorrt_execution
from rekd_deploy.runtimes.tensorrt.library import PRODUCTS
from rekd_deploy.server.server import TritonServer
from rekd_train.errors import ConfigError, RekdError
from rekd_train.files import sha256

ROLES = ("selector", "predictor", "single")


@pytest.fixture(scope="module")
def engine_repository(checkpoint, tmp_path_factory):
    """A repository with real engines of TensorRT-RTX. Do not change its files."""
    pytest.importorskip("tensorrt_rtx")
    root = tmp_path_factory.mktemp("engines") / "python"
    publish(checkpoint, root, engine="tensorrt-rtx", single_graph=True, batches=(1, 8), lengths=(16, 48))
    return root


@pytest.fixture
def gpu(engine_repository, monkeypatch):
    """A fake driver and library that stand the repository's real engines for its graphs."""
    manifest, driver = read_manifest(engine_repository), FakeDriver()
    library = FakeLibrary(driver, manifest["artefacts"]["selector"]["engine"]["version"])
    for role in ROLES:
        plan = plan_path(engine_repository, manifest, role).read_bytes()
        profiles = manifest["artefacts"][role]["engine"]["profiles"]
        library.plans[plan] = (str(graph_path(engine_repository, manifest, role)), profiles)
    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    return driver


@pytest.mark.tensorrt
def test_a_repository_with_engines_is_whole_and_says_what_they_are(engine_repository):
    manifest = check_repository(engine_repository)
    for role, model in zip(ROLES, (SELECTOR, PREDICTOR, SINGLE), strict=True):
        folder = engine_repository / model / "1"
        names = sorted(path.name for path in folder.iterdir())
        code = ["model.py", "tensorrt_execution.py", "triton_graphs.py"]
        assert names == ["model.onnx", "model.plan", *code]
        entry = manifest["artefacts"][role]["engine"]
        assert entry["sha256"] == sha256(folder / PLAN) == manifest["repository"]["files"][f"{model}/1/{PLAN}"]
        assert entry["graph_sha256"] == sha256(folder / "model.onnx") == manifest["artefacts"][role]["sha256"]
        assert (entry["observed"], entry["status"]) == ("not available", "unverified")
        assert [profile["input_ids"][2] for profile in entry["profiles"]] == [[2, 16], [2, 48], [8, 16], [8, 48]]
        assert manifest["artefacts"][role]["fused"] == {}
        config = read_config(engine_repository / model / "config.pbtxt")
        assert (config.backend, config.max_batch_size) == ("python", 8)
        assert parameters_of(config)["engine"] == "tensorrt-rtx"
        assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_GPU]


@pytest.mark.tensorrt
def test_an_altered_engine_is_found(engine_repository, tmp_path):
    copy = shutil.copytree(engine_repository, tmp_path / "copy")
    plan = copy / PREDICTOR / "1" / PLAN
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    with pytest.raises(RepositoryError, match=f"{PREDICTOR}/1/{PLAN} changed since the export"):
        check_repository(copy)


@pytest.mark.tensorrt
@pytest.mark.parametrize("single_graph", [False, True])
def test_the_pipeline_on_engines_answers_as_on_graphs(engine_repository, gpu, texts, single_graph):
    many = texts * 2
    with Pipeline(engine_repository, engine=True, single_graph=single_graph) as pipeline:
        answers = pipeline.predict(many)
        assert gpu.blocks
    assert not gpu.blocks
    with Pipeline(engine_repository) as pipeline:
        assert_same_answers(answers, pipeline.predict(many))


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


def test_without_engines_the_pipeline_says_so(repository):
    with pytest.raises(RepositoryError, match=r"holds no engine of the selector; fix: .*--engine tensorrt-rtx"):
        Pipeline(repository, engine=True)


# targets


@pytest.fixture
def with_engines(artefacts):
    """The tiny artefacts as if engines of a product had been built."""

    def made(product: str, **request):
        planned = plan_engines(artefacts, PRODUCTS[product], EngineRequest(**request))
        entries = {
            role: {**entry, **planned.manifest["artefacts"][role]}
            for role, entry in artefacts.manifest["artefacts"].items()
        }
        manifest = {**artefacts.manifest, "artefacts": json.loads(json.dumps(entries))}
        return replace(planned, engines=dict.fromkeys(entries, artefacts.selector), manifest=manifest)

    return made


def test_triton_s_own_onnx_runtime_needs_the_graphs_alone(artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "onnxruntime", target="onnxruntime", threads=3)
    assert [path.name for path in (root / SELECTOR / "1").iterdir()] == ["model.onnx"]
    assert check_repository(root)["repository"]["target"] == "onnxruntime"
    config = read_config(root / SELECTOR / "config.pbtxt")
    assert config.backend == "onnxruntime" and parameters_of(config) == {
        "intra_op_thread_count": "3", "inter_op_thread_count": "1", "execution_mode": "0", "enable_mem_arena": "1",
        "enable_mem_pattern": "0",
    }
    assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_CPU]
    on_gpu = build_configs(artefacts, ServingSettings(gpu=True), "onnxruntime")[PREDICTOR]
    assert [group.kind for group in on_gpu.instance_group] == [on_gpu.instance_group[0].KIND_GPU]


def test_triton_s_own_tensorrt_gets_plans_and_may_choose_every_profile(with_engines, tmp_path):
    root = write_repository(with_engines("tensorrt", lengths=(16, 32)), tmp_path / "tensorrt", target="tensorrt")
    assert sorted(path.name for path in (root / SELECTOR / "1").iterdir()) == ["model.onnx", "model.plan"]
    check_repository(root)
    config = read_config(root / SELECTOR / "config.pbtxt")
    assert config.backend == "tensorrt" and not config.parameters
    assert list(config.instance_group[0].profile) == ["0", "1", "2"]
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert read_config(root / ENSEMBLE / "config.pbtxt").platform == "ensemble"


@pytest.mark.parametrize(
    ("product", "target"), [("tensorrt", "python"), ("tensorrt-rtx", "tensorrt"), ("tensorrt", "onnxruntime")]
)
def test_a_target_runs_no_engine_of_another_product(with_engines, product, target):
    with pytest.raises(RepositoryError, match=f"target '{target}' runs .* the export has {product}; fix: "):
        build_configs(with_engines(product), ServingSettings(), target)


def test_tensorrt_without_engines_is_refused(artefacts):
    with pytest.raises(RepositoryError, match="the export has none"):
        build_configs(artefacts, ServingSettings(), "tensorrt")


def test_batches_that_an_engine_does_not_take_are_refused(with_engines):
    artefacts = with_engines("tensorrt", max_batch_size=32)
    with pytest.raises(RepositoryError, match="max_batch_size is 64, but the engine of the selector takes at most 32"):
        build_configs(artefacts, ServingSettings(max_batch_size=64), "tensorrt")


@pytest.mark.parametrize("lengths", [None, (16, 32)])
def test_configs_fit_the_engines_shapes(with_engines, lengths):
    artefacts = with_engines("tensorrt", max_batch_size=32, lengths=lengths)
    entry = artefacts.manifest["artefacts"]["predictor"]["engine"]
    config = build_configs(artefacts, ServingSettings(max_batch_size=32), "tensorrt")[PREDICTOR]
    assert engine_mistakes(config, entry) == []
    config.input[1].dims[0] = 12
    assert "dims [12] of positions differ from the engine's [-1]" in " ".join(engine_mistakes(config, entry))


def test_an_engine_on_a_cpu_instance_is_a_mistake(with_engines):
    configs = build_configs(with_engines("tensorrt-rtx"), ServingSettings(), "python")
    assert config_mistakes(configs) == []
    for name in (SELECTOR, PREDICTOR):
        configs[name].instance_group[0].kind = configs[name].instance_group[0].KIND_CPU
    assert [mistake for mistake in config_mistakes(configs) if "an engine runs on a GPU only" in mistake]


def test_without_tensorrt_the_engines_are_deferred_and_built_where_they_serve(
    checkpoint, artefacts, tmp_path, monkeypatch
):
    root, driver = tmp_path / "tensorrt", FakeDriver(devices=0)
    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", lambda name: driver)
    published = publish(checkpoint, root, target="tensorrt", batches=(1, 8), lengths=(16, 48))
    manifest = check_repository(root)
    assert published.manifest == manifest and not list(root.rglob(PLAN))
    for role, model in (("selector", SELECTOR), ("predictor", PREDICTOR)):
        entry = manifest["artefacts"][role]["engine"]
        assert (entry["status"], entry["sha256"], entry["format"]) == ("unverified", None, "tensorrt")
        assert entry["graph_sha256"] == sha256(graph_path(root, manifest, role))
        config = read_config(root / model / "config.pbtxt")
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
    asked = {}

    def build(_, graph, plan, signature, profiles, settings):
        asked[graph] = (profiles, settings.precision)
        plan.write_bytes(str(graph).encode())
        library.plans[plan.read_bytes()] = (str(graph), profiles)
        entry = next(e["engine"] for e in manifest["artefacts"].values() if e["sha256"] == sha256(graph))
        return {**entry, "version": library.__version__, "sha256": sha256(plan), "bytes": plan.stat().st_size,
                "built_for": ["the machine of the export"]}

    monkeypatch.setattr(export_engines, "build_engine", build)
    assert "verified on Fake RTX" in "\n".join(verification_lines(verify(root)))
    now = check_repository(root)
    for role, model in (("selector", SELECTOR), ("predictor", PREDICTOR)):
        entry = now["artefacts"][role]["engine"]
        assert (entry["status"], entry["observed"], entry["version"]) == ("verified", "fp32", "10.9.0.34")
        assert now["repository"]["files"][f"{model}/1/{PLAN}"] == entry["sha256"]
        assert asked[graph_path(root, now, role)] == ([
            {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()} for profile in entry["profiles"]
        ], "fp32")
    asked.clear()
    verify(root)
    assert not asked, "what is built is not built again"


# options


def test_options_know_what_a_target_runs():
    assert ExportOptions().product is None and ExportOptions().fuse
    assert ExportOptions(target="tensorrt").product == "tensorrt"
    options = ExportOptions(engine="tensorrt-rtx", batches=(1, 4), lengths=(16,))
    assert options.product == "tensorrt-rtx" and not options.fuse
    assert options.engines == EngineRequest(4, (1, 4), (16,))
    for target, engine in (("onnxruntime", "tensorrt-rtx"), ("tensorrt", "tensorrt-rtx"), ("python", "tensorrt")):
        with pytest.raises(ConfigError, match=f"target '{target}' cannot run the engine '{engine}'; fix: "):
            ExportOptions(target=target, engine=engine)


def test_a_missing_library_is_said_before_anything_is_done(checkpoint, tmp_path, monkeypatch):
    import importlib

    load = importlib.import_module

    def without(name, *arguments):
        if name.startswith("tensorrt"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return load(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    for options, complaint in (
        ({"engine": "tensorrt-rtx"}, r"'tensorrt_rtx' is not installed; fix: pip install -e '.*\[tensorrt-rtx\]'"),
    ):
        with pytest.raises(RekdError, match=complaint) as refusal:
            publish(checkpoint, tmp_path / "root", report=pytest.fail, **options)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "root").exists()


def test_a_size_outside_the_model_s_is_refused(artefacts):
    with pytest.raises(EngineError, match=r"length 49 is outside 3..48"):
        plan_engines(artefacts, PRODUCTS["tensorrt-rtx"], EngineRequest(lengths=(49,)))


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_engine_has_one_profile_unless_lengths_are_asked_for(with_engines, product):
    for lengths, count in ((None, 1), ((16, 48), 2)):
        profiles = with_engines(product, lengths=lengths).manifest["artefacts"]["selector"]["engine"]["profiles"]
        assert len(profiles) == count and profiles[-1]["input_ids"][1:] == [[8, 48], [64, 48]]


# where there is a GPU, at the export


@pytest.fixture
def built(artefacts, with_engines, monkeypatch, tmp_path):
    """Artefacts whose engines the fake GPU runs, and its library."""
    driver = FakeDriver()
    library = FakeLibrary(driver)
    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    made = with_engines("tensorrt-rtx")
    entries, plans = made.manifest["artefacts"], {}
    for role, graph in made.graphs.items():
        plans[role] = tmp_path / f"{role}.plan"
        plans[role].write_bytes(role.encode())
        library.plans[role.encode()] = (str(graph), entries[role]["engine"]["profiles"])
        entries[role]["engine"] |= {
            "version": library.__version__, "built_for": ["sm89"], "precision": "fp32",
            "status": "unverified", "sha256": sha256(plans[role]),
            "graph_sha256": sha256(graph),
        }  # fmt: skip
    return replace(made, engines=plans), library


def test_engines_that_can_run_are_verified_before_they_are_published(built):
    artefacts, _ = built
    proved = prove_engines(artefacts)
    for role in ("selector", "predictor"):
        entry = proved.manifest["artefacts"][role]["engine"]
        assert (entry["status"], entry["observed"], entry["gpu"]) == ("verified", "fp32", "Fake RTX (sm89)")
        assert artefacts.manifest["artefacts"][role]["engine"]["status"] == "unverified"


def test_an_engine_that_answers_otherwise_is_not_published(built, tmp_path):
    artefacts, library = built
    graph = onnx.load(artefacts.predictor)
    bias = next(weight for weight in graph.graph.initializer if weight.name == "predictor.head.1.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
    onnx.save(graph, tmp_path / "other.onnx")
    library.plans[b"predictor"] = (str(tmp_path / "other.onnx"), library.plans[b"predictor"][1])
    with pytest.raises(ParityError, match="the predictor's engine is not the model and is not published: a class"):
        prove_engines(artefacts)


def test_engines_that_cannot_run_here_stay_unverified(built, monkeypatch):
    artefacts, library = built
    artefacts.manifest["artefacts"]["predictor"]["engine"]["built_for"] = ["sm120"]
    assert prove_engines(artefacts) is artefacts
    assert reason_not_to_run(artefacts.manifest["artefacts"]["predictor"]["engine"]) == (
        "it was built for sm120, this machine's Fake RTX is sm89; fix: verify on such a card, or export again"
    )
    artefacts.manifest["artefacts"]["predictor"]["engine"]["built_for"] = ["sm89"]
    library.driver.devices = 0
    assert prove_engines(artefacts) is artefacts


# what rekd-serve says


def test_the_server_of_the_wheel_runs_the_python_backend_alone(artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "onnxruntime", target="onnxruntime")
    with pytest.raises(ServerError, match="needs Triton's backend 'onnxruntime', and there is no .*--target"):
        TritonServer(root, 0, 0, 0).start()


def test_a_server_without_a_gpu_refuses_engines(built, tmp_path):
    artefacts, library = built
    root = write_repository(artefacts, tmp_path / "python")
    library.driver.devices = 0
    with pytest.raises(ServerError, match="engines, and that of the selector cannot run here: there is no GPU 0"):
        TritonServer(root, 0, 0, 0).start()
