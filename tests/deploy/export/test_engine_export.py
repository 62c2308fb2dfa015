"""From a checkpoint to a repository with engines, what runs them, and how they are verified, on a fake GPU."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from fake_tensorrt import FakeLibrary
from families import assert_same_answers
from test_verify import changed_weights, sign
from triton_stub import started

from rekd_deploy.cli.export_summary import verification_lines
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import ParityError, RepositoryError, ServerError
from rekd_deploy.export import engines as export_engines
from rekd_deploy.export.engines import EngineRequest, plan_engines
from rekd_deploy.export.run import publish
from rekd_deploy.export.verify import verify
from rekd_deploy.parity.engines import prove_engines, reason_not_to_run
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import PREDICTOR, SELECTOR, SINGLE, ServingSettings, parameters_of, read_config
from rekd_deploy.repository.reader import PLAN, Exported, check_repository, graph_path, plan_path, read_manifest
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.tensorrt import PRODUCTS
from rekd_deploy.server.server import TritonServer
from rekd_train.files import sha256

pytestmark = pytest.mark.slow

MODELS = {"selector": SELECTOR, "predictor": PREDICTOR, "single": SINGLE}
BOTH = ("selector", "predictor")


def engine_entry(root, role="selector"):
    return read_manifest(root)["artefacts"][role]["engine"]


def said(verification) -> str:
    return "\n".join(verification_lines(verification))


@pytest.fixture(scope="module")
def engine_repository(checkpoint, tmp_path_factory):
    """A repository with real engines. Do not change its files."""
    pytest.importorskip("tensorrt_rtx")
    root = tmp_path_factory.mktemp("engines") / "python"
    publish(checkpoint, root, engine="tensorrt-rtx", single_graph=True, batches=(1, 8), lengths=(16, 48))
    return root


@pytest.mark.tensorrt
def test_a_repository_with_engines_is_whole_and_answers_on_them_as_on_graphs(
    engine_repository, fake_rtx, inside_triton, texts, artefacts):
    manifest = check_repository(engine_repository)
    for role, model in MODELS.items():
        folder, artefact = engine_repository / model / "1", manifest["artefacts"][role]
        code = ["model.py", "tensorrt_execution.py", "triton_graphs.py", "triton_tensors.py"]
        assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.plan", *code]
        entry = artefact["engine"]
        assert entry["sha256"] == sha256(folder / PLAN) == manifest["repository"]["files"][f"{model}/1/{PLAN}"]
        assert entry["graph_sha256"] == sha256(folder / "model.onnx") == artefact["sha256"]
        assert (entry["precision"], entry["status"], artefact["fused"]) == ("fp32", "unverified", {})
        assert [profile["input_ids"][2] for profile in entry["profiles"]] == [[2, 16], [2, 48], [8, 16], [8, 48]]
        config = read_config(engine_repository / model / "config.pbtxt")
        assert (config.backend, config.max_batch_size) == ("python", 8)
        assert parameters_of(config)["engine"] == "tensorrt-rtx"
        assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_GPU]
    manifest, gpu = read_manifest(engine_repository), fake_rtx.driver
    for role in MODELS:
        plan = plan_path(engine_repository, manifest, role).read_bytes()
        profiles = manifest["artefacts"][role]["engine"]["profiles"]
        fake_rtx.plans[plan] = (str(graph_path(engine_repository, manifest, role)), profiles)
    for single_graph in (False, True):
        with Pipeline(engine_repository, engine=True, single_graph=single_graph) as pipeline:
            answers = pipeline.predict(texts * 2)
            assert gpu.blocks
        assert not gpu.blocks
        with Pipeline(engine_repository) as pipeline:
            assert_same_answers(answers, pipeline.predict(texts * 2))
    folder = engine_repository / SELECTOR / "1"
    model = started(engine_repository, SELECTOR, model_instance_kind="GPU", model_instance_device_id="0")
    inputs = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask")}
    found = model._graph.run(["mask", "scores"], inputs)
    with OnnxRuntimeRunner(folder / "model.onnx", artefacts.signature.selector, "it") as reference:
        expected = reference.run(inputs)
    assert all((array == expected[name]).all() for array, name in zip(found, ("mask", "scores"), strict=True))
    model.finalize()
    assert not gpu.blocks


def planned(artefacts, product: str, **request):
    made = plan_engines(artefacts, PRODUCTS[product], EngineRequest(**request))
    manifest = json.loads(json.dumps(made.manifest))
    return replace(made, engines=dict.fromkeys(made.engines, artefacts.selector), manifest=manifest)


@pytest.mark.parametrize(("product", "target", "limits", "complaint"), [
    ("tensorrt", "python", {}, "target 'python' runs .* the export has tensorrt; fix: "),
    ("tensorrt-rtx", "tensorrt", {}, "target 'tensorrt' runs .* the export has tensorrt-rtx; fix: "),
    ("tensorrt", "onnxruntime", {}, "target 'onnxruntime' runs .* the export has tensorrt; fix: "),
    (None, "tensorrt", {}, "the export has none"),
    ("tensorrt", "tensorrt", {"max_batch_size": 32}, "size is 64, but the engine of the selector takes at most 32")])
def test_what_a_target_cannot_run_is_refused(artefacts, product, target, limits, complaint):
    made = planned(artefacts, product, **limits) if product else artefacts
    with pytest.raises(RepositoryError, match=complaint):
        build_configs(made, ServingSettings(max_batch_size=64), target)


def test_without_tensorrt_the_engines_are_deferred_and_built_where_they_serve(
    checkpoint, artefacts, repository, tmp_path, fake_gpu, monkeypatch):
    root, fake_gpu.devices = tmp_path / "tensorrt", 0
    manifest = publish(checkpoint, root, target="tensorrt", batches=(1, 8), lengths=(16, 48)).manifest
    assert not list(root.rglob(PLAN))
    for role in BOTH:
        entry, config = manifest["artefacts"][role]["engine"], read_config(root / MODELS[role] / "config.pbtxt")
        assert (entry["status"], entry["sha256"], entry["format"]) == ("unverified", None, "tensorrt")
        assert entry["graph_sha256"] == sha256(graph_path(root, manifest, role))
        assert config.backend == "tensorrt" and len(config.instance_group[0].profile) == len(entry["profiles"])
    assert [path.name for path in (root / SELECTOR / "1").iterdir()] == ["model.onnx"]
    rows = np.array([[2, 5, 3], [2, -1, 3]])  # nothing of ours stands before Triton's tensorrt backend
    with OnnxRuntimeRunner(graph_path(root, manifest, "selector"), artefacts.signature.selector, "it") as selector:
        scores = selector.run({"input_ids": rows, "attention_mask": np.ones_like(rows)})["scores"]
    assert np.isfinite(scores[0]).all() and np.isnan(scores[1]).all()
    assert "selector engine unverified, not built yet: there is no GPU 0" in said(verify(root))
    assert read_manifest(root) == manifest
    for place, complaint in ((root, "not built yet; fix: rekd-export --verify"),
                             (repository, "holds no engine of the selector; .*--engine tensorrt-rtx")):  # fmt: skip
        with pytest.raises(RepositoryError, match=complaint):
            Exported.of(place).engine_runner("selector")
    # on the target
    fake_gpu.devices, library, built = 1, FakeLibrary(fake_gpu, "10.9.0.34"), {}
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    def build(_, graph, plan, signature, profiles, precision):
        built[graph] = (json.loads(json.dumps(profiles)), precision)
        plan.write_bytes(str(graph).encode())
        library.plans[plan.read_bytes()] = (str(graph), profiles)
        entry = next(e["engine"] for e in manifest["artefacts"].values() if e["sha256"] == sha256(graph))
        return {**entry, "version": library.__version__, "sha256": sha256(plan), "bytes": plan.stat().st_size}
    monkeypatch.setattr(export_engines, "build_engine", build)
    assert "verified on Fake RTX" in said(verify(root))
    now = check_repository(root)
    for role in BOTH:
        entry = now["artefacts"][role]["engine"]
        assert (entry["status"], entry["version"]) == ("verified", "10.9.0.34")
        assert now["repository"]["files"][f"{MODELS[role]}/1/{PLAN}"] == entry["sha256"]
        assert built.pop(graph_path(root, now, role)) == (entry["profiles"], "fp32")
    verify(root)
    assert not built, "what is built is not built again"


@pytest.fixture
def built(artefacts, fake_rtx, tmp_path):
    made = planned(artefacts, "tensorrt-rtx")
    plans = {role: tmp_path / f"{role}.plan" for role in made.graphs}
    for role, graph in made.graphs.items():
        entry = made.manifest["artefacts"][role]["engine"]
        plans[role].write_bytes(role.encode())
        fake_rtx.plans[role.encode()] = (str(graph), entry["profiles"])
        entry |= {"version": fake_rtx.__version__, "built_for": ["sm89"], "precision": "fp32", "status": "unverified",
                  "bytes": len(role), "sha256": sha256(plans[role]), "graph_sha256": sha256(graph)}  # fmt: skip
    return replace(made, engines=plans)


@pytest.fixture
def root(built, tmp_path):
    return write_repository(built, tmp_path / "r")


@pytest.fixture
def otherwise(fake_rtx, tmp_path):
    """Lets the engine of a role run another checkpoint's graph."""
    def change(role):
        graph, profiles = fake_rtx.plans[role.encode()]
        (tmp_path / "other.onnx").write_bytes(changed_weights(graph))
        fake_rtx.plans[role.encode()] = (str(tmp_path / "other.onnx"), profiles)
    return change


def test_on_a_gpu_engines_are_verified_before_they_are_published_and_by_verify(built, otherwise, root):
    proved = prove_engines(built)
    for role in BOTH:
        entries = [made.manifest["artefacts"][role]["engine"] for made in (proved, built)]
        assert entries[0] == entries[1] | {"status": "verified", "gpu": "Fake RTX (sm89)"} != entries[1]
    verification = verify(root)
    assert verification.engines["selector"].agreement.score_difference < 1e-4
    assert verification.engines["predictor"].agreement.compared_classes > 20
    assert [engine_entry(root, role)["status"] for role in BOTH] == ["verified"] * 2
    assert "verified on Fake RTX" in said(verification)
    assert json.loads(json.dumps(verification.to_dict()))["engines"]["selector"]["gpu"].startswith("Fake RTX")
    before = (root / "manifest.json").stat().st_mtime_ns
    verify(root)
    assert (root / "manifest.json").stat().st_mtime_ns == before
    otherwise("predictor")
    with pytest.raises(ParityError, match="the predictor's engine is not the model and is not published: a class"):
        prove_engines(built)


def test_engines_run_where_they_can_and_else_stay_unverified(built, root, fake_gpu, monkeypatch):
    entry = built.manifest["artefacts"]["predictor"]["engine"]
    entry["built_for"] = ["sm120"]
    assert prove_engines(built) is built
    reason = "it was built for sm120, this machine's Fake RTX is sm89; fix: verify on such a card, or export again"
    assert reason_not_to_run(entry) == reason
    entry["built_for"] = ["sm89"]
    fake_gpu.devices = 0
    assert prove_engines(built) is built
    with pytest.raises(ServerError, match="engines, and that of the selector cannot run here: there is no GPU 0"):
        TritonServer(root, 0, 0, 0).start()
    fake_gpu.devices = 0
    verification = verify(root)
    assert engine_entry(root)["status"] == "unverified" and set(verification.graphs) == {*BOTH}
    assert "selector engine unverified: there is no GPU 0" in said(verification)
    monkeypatch.setattr("rekd_deploy.export.verify.check_device", lambda device: None)  # of ONNX Runtime
    manifest = read_manifest(root)
    manifest["parity"]["emulated"] = True  # so that the engines alone are run
    (root / "manifest.json").write_text(json.dumps(manifest))
    fake_gpu.devices = 1
    assert "GPU 1" in verify(root, device="cuda:1").engines["selector"].reason
    fake_gpu.devices = 2
    assert verify(root, device="cuda:1").engines["selector"].agreement.rows > 20


@pytest.mark.parametrize(("change", "devices", "complaint"), [
    ({"graph_sha256": "0" * 64}, 0, "is stale: it was not built from the model.onnx beside it"),
    ({"graph_sha256": "0" * 64}, 1, "is stale: it was not built from the model.onnx beside it"),
    ({"sha256": "0" * 64}, 0, "was altered"),
    ({"version": "1.6.0"}, 1, "was built with TensorRT-RTX 1.6.0, 1.7.1.116 is installed"),
    ({"profiles": [{"input_ids": [[1, 3], [1, 3], [1, 3]]}]}, 1, "has the profiles .*, the manifest says")])
def test_an_engine_that_is_not_its_entry_s_is_named(root, fake_gpu, change, devices, complaint):
    fake_gpu.devices, manifest = devices, read_manifest(root)
    manifest["artefacts"]["predictor"]["engine"] |= change
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RepositoryError, match=f"rekd_predictor/1/model.plan {complaint}"):
        verify(root)
    assert not fake_gpu.blocks


def test_an_engine_of_another_checkpoint_and_an_altered_one_are_named(root, otherwise):
    otherwise("selector")
    with pytest.raises(RepositoryError, match=r"rekd_selector/1/model.plan does not answer.*a selector score differs"):
        verify(root)
    assert engine_entry(root)["status"] == "unverified"
    (root / "rekd_selector/1/model.plan").write_bytes(b"other")
    with pytest.raises(RepositoryError, match=r"rekd_selector/1/model.plan changed"):
        verify(root)
    sign(root, "rekd_selector/1/model.plan")
    with pytest.raises(RepositoryError, match=r"model.plan was altered"):
        verify(root)
