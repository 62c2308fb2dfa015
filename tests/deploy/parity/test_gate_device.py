"""Graphs are proved on the device that will serve them, within the limits of their precision, or it is said."""

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import make_rationalizer, raising
from onnx import numpy_helper
from precisions import traced

from rekd_deploy.cli.export import app
from rekd_deploy.cli.export_summary import verification_lines
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.contract.parity_report import ParityReport, limits_of, verification_limits
from rekd_deploy.errors import EngineError, ExportError, ParityError, RepositoryError
from rekd_deploy.export import checkpoint as gate_device
from rekd_deploy.export import graphs as export_module
from rekd_deploy.export import verify
from rekd_deploy.export.graphs import export
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.export.run import publish
from rekd_deploy.graphs import precision as precision_module
from rekd_deploy.graphs.int8 import to_int8
from rekd_deploy.parity import gate as gate_module
from rekd_deploy.parity.examples import Examples
from rekd_deploy.parity.gate import check_parity
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.runtimes import onnxruntime_device
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.slow

CPUS, GPUS = ({"target": "onnxruntime", "gpu": gpu} for gpu in (False, True))
EXAMPLES = Examples(["a fine film", "a dull one"], "file")


@pytest.fixture
def gpus(monkeypatch):
    """Devices and graphs that were asked for; ``spoil`` changes what they answer."""
    class OnCpu(DeviceChain):
        seen = []
        spoil = staticmethod(lambda answers: answers)
        def __init__(self, graphs, *, device):
            super().__init__(graphs, device="cpu")
            OnCpu.seen.append((device, [graph.name for graph in graphs]))
        def run(self, inputs):
            return OnCpu.spoil(super().run(inputs))
    monkeypatch.setattr(onnxruntime_device, "DeviceChain", OnCpu)
    for module in (verify, gate_device):
        monkeypatch.setattr(module, "check_device", lambda device: None)
    return OnCpu


@pytest.fixture
def no_cuda():
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime serves GPUs")


def spoil(name, change, where=()):
    """Answers with one of them changed, where those of other names are among them."""
    wanted = {name, *where}
    return staticmethod(
        lambda answers: answers | {name: change(answers[name])} if wanted <= answers.keys() else answers)


def said(verification) -> str:
    return "\n".join(verification_lines(verification))


def test_the_gate_runs_on_the_device_and_refuses_what_it_computes_wrongly(rationalizer, artefacts, gpus):
    report = check_parity(rationalizer, artefacts.graphs, EXAMPLES, device="cuda:1")
    decision = ["the decision of selector.onnx"]
    assert gpus.seen == [("cuda:1", ["selector.onnx", "predictor.onnx"]), ("cuda:1", decision)]
    assert report.to_dict()["device"] == "cuda:1"
    on_cpu = check_parity(rationalizer, artefacts.graphs, EXAMPLES)
    assert len(gpus.seen) == 2 and on_cpu == replace(report, device="cpu")
    for name in ("scores", "logits", "probabilities", "mask"):
        gpus.spoil = spoil(name, lambda array, name=name: ~array if name == "mask" else array + np.float32(1e-3))
        with pytest.raises(ParityError, match="the graphs are not the model and are not published"):
            check_parity(rationalizer, artefacts.graphs, EXAMPLES, device="cuda")


def test_it_is_where_graphs_will_be_served_and_an_absent_gpu_is_the_reason_or_an_error(gpus, monkeypatch):
    for options, device in (
        ({}, ("cpu", "")), (CPUS, ("cpu", "")), (GPUS, ("cuda", "")), (GPUS | {"gpus": (2, 3)}, ("cuda:2", "")),
        (GPUS | {"device": "cuda:1"}, ("cuda:1", "")), ({"device": "cuda"}, ("cuda", "")),
        ({"engine": "tensorrt-rtx"}, ("cpu", "")), (GPUS | {"device": "cpu"}, ("cpu", "--device cpu was given")),
    ):  # fmt: skip
        assert gate_device.gate_device(ExportOptions(**options)) == device
    monkeypatch.setattr(gate_device, "check_device", raising(EngineError("there is no such GPU")))
    assert gate_device.gate_device(ExportOptions(**GPUS)) == ("cpu", "there is no such GPU")
    with pytest.raises(EngineError, match="there is no such GPU"):
        gate_device.gate_device(ExportOptions(**GPUS, device="cuda:1"))


def test_an_export_for_gpus_is_proved_there(checkpoint, tmp_path, gpus):
    publication = publish(checkpoint, tmp_path / "r", single_graph=True, **GPUS)
    assert {device for device, _ in gpus.seen} == {"cuda"} and len(gpus.seen) == 4
    artefacts, *parity = (publication.manifest[name] for name in ("artefacts", "parity", "single_parity"))
    assert [each["device"] for each in parity] == ["cuda", "cuda"] and publication.not_proved_there == ""
    assert {(entry["precision"], entry["observed"]) for entry in artefacts.values()} == {("fp16", "fp16")}
    assert parity[0]["limits"] == asdict(limits_of("fp16", "fp16"))


def test_without_a_gpu_the_export_says_what_proves_it_there(checkpoint, tmp_path, run_cli, no_cuda):
    root, options = tmp_path / "r", ["--target", "onnxruntime", "--gpu"]
    code, printed, warning = run_cli(app, checkpoint, *options, "--output", root, "--json")
    (line,) = warning.splitlines()
    there = verify.verify(root)
    assert there.served_on == "cuda" and "fix: --device cuda on its machine" in said(there)
    assert line.startswith("warning: the graphs are proved on the CPU, not on the GPU that will serve them, since here")
    assert line.endswith(f"on that machine: rekd-export --verify {root} --device cuda")
    document = json.loads(printed)
    assert code == 0 and document["parity"]["device"] == "cpu" and "onnxruntime-gpu" in document["not_proved_there"]
    assert "onnxruntime-gpu" not in (root / "manifest.json").read_text(), "the same bytes wherever"
    (line,) = (
        line for line in run_cli(app, checkpoint, "--dry-run", *options)[1].splitlines() if line.startswith("gate "))
    assert "proved on the CPU, not on the GPU" in line and line.endswith("--device cuda")
    assert json.loads(run_cli(app, checkpoint, "--dry-run", "--json")[1])["gate_device"] == "cpu"


@pytest.mark.parametrize("command", [
    "export {checkpoint} --output {new}", "export {checkpoint} --dry-run", "export --verify {new}",
    "query --local {repository} film"])
def test_a_gpu_that_was_asked_for_and_is_not_there(command, checkpoint, repository, tmp_path, no_cuda):
    new = tmp_path / "r"
    module, *arguments = command.format(checkpoint=checkpoint, repository=repository, new=new).split()
    program = [sys.executable, "-m", f"rekd_deploy.cli.{module}", *arguments, "--device", "cuda"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and not new.exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the Python package 'onnxruntime-gpu' is not installed; fix: ")


def test_verification_and_its_gate_run_on_the_device_that_is_to_serve(repository, gpus, checkpoint):
    verification = verify.verify(repository, checkpoint=checkpoint, device="cuda:1")
    on_cpu, lines = verify.verify(repository), verification_lines(verification)
    assert gpus.seen[:2] == [("cuda:1", ["rekd_selector"]), ("cuda:1", ["rekd_predictor"])]
    assert gpus.seen[2][0] == "cuda:1" and len(gpus.seen[2][1]) == 2
    assert verification.graphs == on_cpu.graphs and "warning" not in said(on_cpu)
    assert verification.to_dict()["device"] == verification.parity["pair"]["device"] == "cuda:1"
    assert "on cuda:1" in lines[1] and "on cuda:1" in "".join(lines[3:])
    for where, complaint in (((), "rekd_predictor.* does not answer as the exported model did"),
                             ({"scores"}, "the graphs are not the model")):  # fmt: skip
        gpus.spoil = spoil("logits", np.negative, where)  # with scores: of the gate alone
        with pytest.raises(RepositoryError, match=complaint):
            verify.verify(repository, checkpoint=checkpoint, device="cuda:1")


def test_graphs_without_stored_answers_are_run_there_and_where_none_ran_none_is_named(artefacts, tmp_path, gpus):
    root = write_repository(replace(artefacts, reference=None), tmp_path / "r")
    verification = verify.verify(root, device="cuda")
    document = verification.to_dict()
    assert [device for device, _ in gpus.seen] == ["cuda", "cuda"] and document["device"] == "cuda"
    assert document["without_cases"] == ["selector", "predictor"]
    assert "\npredictor   runs on cuda; its answers are not" in said(verification)
    gpus.spoil = spoil("logits", lambda array: array * np.nan)
    with pytest.raises(RepositoryError, match="gives logits that are no numbers"):
        verify.verify(root, device="cuda")
    gpus.seen.clear()
    manifest = deepcopy(artefacts.manifest)
    manifest["parity"]["emulated"] = True
    root = write_repository(replace(artefacts, manifest=manifest), tmp_path / "emulated")
    verification = verify.verify(root, device="cuda")
    assert gpus.seen == [] and verification.to_dict()["device"] is None
    assert "not compared: ONNX Runtime cannot compute" in said(verification)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A checkpoint with examples whose labels are the model's own answers, save two."""
    model = make_rationalizer()
    texts = [f"{first} {second} film and a {third} end" for first in ("good", "bad", "dull", "great")
             for second in ("dark", "bright", "long", "fun") for third in ("awful", "wonderful", "boring", "nice")]
    names = [answer.label for answer in model.predict(texts)]
    names[:2] = [next(label for label in model.labels if label != name) for name in names[:2]]
    examples = [{"text": text, "label": name} for text, name in zip(texts, names, strict=True)]
    return save(model, tmp_path_factory.mktemp("labelled") / "checkpoint", examples=examples)


@pytest.fixture(scope="module")
def published(labelled, tmp_path_factory):
    return publish(labelled, tmp_path_factory.mktemp("int8") / "models", precision="int8", single_graph=True)


@pytest.fixture
def examples_alone(monkeypatch):
    """A gate without the constructed rows, which take most of its time; graphs are traced once."""
    monkeypatch.setattr(gate_module, "constructed_inputs", lambda *model: iter(()))
    monkeypatch.setattr(export_module, "traced_graphs", lambda model, *, fused, **others: dict(traced("bert", fused)))


def test_an_int8_repository_carries_its_figures_answers_and_is_verified(published, labelled, examples_alone):
    artefacts, parity = published.manifest["artefacts"], published.manifest["parity"]
    precisions = {role: (entry["precision"], entry["observed"]) for role, entry in artefacts.items()}
    assert precisions == dict.fromkeys(("selector", "predictor", "single"), ("int8", "int8"))
    assert artefacts["predictor"]["multiplications"] == {"fp32": 1, "int8": 12}
    assert parity["source"] == "checkpoint" and parity["labelled"] == parity["examples"] == 64
    assert parity["model_correct"] == 62 and parity["graphs_correct"] >= 61
    assert parity["limits"]["accuracy_drop"] == 0.01 and parity["limits"]["scores"] is None
    assert parity["masks"]["jaccard"] >= 0.97 and parity["class_agreement"] >= 0.98
    assert parity["score_difference"] > 1e-4 and not parity["rule_violations"]
    json.dumps(published.manifest, allow_nan=False)
    limits = verification_limits(parity)  # a wrong graph is beyond what int8 may differ by
    assert parity["score_difference"] < limits["scores"] < 3 * parity["score_difference"]
    assert limits["flips"] == 2 * parity["flipped_positions"] + 1
    plain = verification_limits(json.loads(json.dumps(ParityReport("file").to_dict())))
    assert (plain["scores"], plain["flips"]) == (1e-4, 0)
    texts = ["good plot and awful actor", "a dull story"]
    with Pipeline(published.root, single_graph=True) as single, Pipeline(published.root) as pair:
        answers = (each.predict(texts) for each in (single, pair, make_rationalizer()))
        for answer, other, wanted in zip(*answers, strict=True):
            assert answer.label == other.label == wanted.label
            assert answer.probabilities == other.probabilities != wanted.probabilities
    verification = verify.verify(published.root, checkpoint=labelled)
    assert verification.parity["pair"]["labelled"] == 64
    assert verification.graphs["single"].score_difference > 1e-4


def test_a_ruined_predictor_is_refused_with_figure_limit_and_fix(labelled, tmp_path, monkeypatch, examples_alone):
    """The head's sign is turned: every class is the other one."""
    def turned(model, guarded, batches, **options):
        converted = to_int8(model, guarded, batches, **options)
        for tensor in converted.graph.initializer:
            if tensor.name.startswith("predictor.head"):
                tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        return converted
    monkeypatch.setattr(precision_module, "to_int8", turned)
    with pytest.raises(ParityError, match=r"the accuracy falls from 0.9688 to .*\(limit 0.01 less\).*--precision fp32"):
        export(labelled, tmp_path, precision="int8")


def test_bf16_is_for_engines_and_proved_by_its_roundings(labelled, tmp_path, examples_alone):
    with pytest.raises(ExportError, match="no bf16 kernels.*fix: --precision fp32, fp16, int8, or an engine"):
        export(labelled, tmp_path, precision="bf16")
    artefacts = export(labelled, tmp_path, precision="bf16", for_engine=True, fused=False)
    assert artefacts.manifest["parity"]["emulated"] and artefacts.manifest["parity"]["score_difference"] > 1e-3
    assert artefacts.manifest["artefacts"]["selector"]["observed"] == "bf16"
    kinds = {tensor.data_type for tensor in onnx.load(artefacts.predictor).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parity.npz", "predictor.onnx", "selector.onnx"]
    root = write_repository(artefacts, tmp_path / "repository")
    assert any("ONNX Runtime cannot compute in bf16" in line for line in verification_lines(verify.verify(root)))
    with pytest.raises(EngineError, match="run the engines, or export with --precision fp32"):
        Pipeline(root).predict(["good film"])
