"""Precisions from the gate to the repository and its verification."""

import json

import onnx
import pytest
from conftest import make_rationalizer
from onnx import numpy_helper
from precisions import traced

from rekd_deploy.cli.export_summary import verification_lines
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.contract.parity_report import ParityReport, verification_limits
from rekd_deploy.errors import EngineError, ExportError, ParityError
from rekd_deploy.export import graphs as export_module
from rekd_deploy.export.graphs import export
from rekd_deploy.export.run import publish
from rekd_deploy.export.verify import verify
from rekd_deploy.graphs import precision as precision_module
from rekd_deploy.graphs.int8 import to_int8
from rekd_deploy.parity import gate as gate_module
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.slow


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
    verification = verify(published.root, checkpoint=labelled)
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
    assert any("ONNX Runtime cannot compute in bf16" in line for line in verification_lines(verify(root)))
    with pytest.raises(EngineError, match="run the engines, or export with --precision fp32"):
        Pipeline(root).predict(["good film"])
