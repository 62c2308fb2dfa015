"""Each precision's limits, from the gate's report to the repository and its verification."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from conftest import make_rationalizer
from onnx import numpy_helper
from precisions import traced

from rekd_deploy.cli.export_summary import verification_lines
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.contract.parity_report import MaskAgreement, ParityReport, limits_of, verification_limits
from rekd_deploy.errors import EngineError, ExportError, ParityError
from rekd_deploy.export import graphs as export_module
from rekd_deploy.export.graphs import export
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.export.run import publish
from rekd_deploy.export.verify import verify
from rekd_deploy.graphs import precision as convert_module
from rekd_deploy.graphs.int8 import to_int8
from rekd_deploy.parity import gate as parity_module
from rekd_deploy.parity.examples import parity_examples
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save
from rekd_train.errors import ConfigError


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
    """A gate without the constructed rows, which take most of its time."""
    monkeypatch.setattr(parity_module, "constructed_inputs", lambda *model: iter(()))


@pytest.fixture
def traced_once(monkeypatch, examples_alone):
    """The graphs of the same model, traced for other tests."""
    monkeypatch.setattr(export_module, "traced_graphs", lambda model, *, fused, **others: dict(traced("bert", fused)))


def test_manifest_carries_precision_asked_and_observed_and_the_figures(published):
    artefacts, parity = published.manifest["artefacts"], published.manifest["parity"]
    assert {role: (entry["precision"], entry["observed"]) for role, entry in artefacts.items()} == dict.fromkeys(
        ("selector", "predictor", "single"), ("int8", "int8")
    )
    assert artefacts["predictor"]["multiplications"] == {"fp32": 1, "int8": 12}
    assert parity["source"] == "checkpoint" and parity["labelled"] == parity["examples"] == 64
    assert parity["model_correct"] == 62 and parity["graphs_correct"] >= 61
    assert parity["limits"]["accuracy_drop"] == 0.01 and parity["limits"]["scores"] is None
    assert parity["masks"]["jaccard"] >= 0.97 and parity["class_agreement"] >= 0.98
    assert parity["score_difference"] > 1e-4 and not parity["rule_violations"]
    json.dumps(published.manifest, allow_nan=False)


def test_an_int8_repository_answers_and_is_verified(published, labelled, examples_alone):
    model = make_rationalizer()
    texts = ["good plot and awful actor", "a dull story"]
    with Pipeline(published.root, single_graph=True) as single, Pipeline(published.root) as pair:
        for answer, other, wanted in zip(single.predict(texts), pair.predict(texts), model.predict(texts), strict=True):
            assert answer.label == other.label == wanted.label
            assert answer.probabilities == other.probabilities != wanted.probabilities
    verification = verify(published.root, checkpoint=labelled)
    assert verification.parity["pair"]["labelled"] == 64
    assert verification.graphs["single"].score_difference > 1e-4


def test_a_wrong_graph_is_beyond_what_int8_may_differ_by(published):
    parity = published.manifest["parity"]
    limits = verification_limits(parity)
    assert parity["score_difference"] < limits["scores"] < 3 * parity["score_difference"]
    assert limits["flips"] == 2 * parity["flipped_positions"] + 1
    plain = json.loads(json.dumps(ParityReport("file").to_dict()))
    assert verification_limits(plain)["scores"] == 1e-4 and verification_limits(plain)["flips"] == 0


def test_a_ruined_predictor_is_refused_with_figure_limit_and_fix(labelled, tmp_path, monkeypatch, traced_once):
    """The head's sign is turned: every class is the other one."""

    def turned(model, guarded, batches, **options):
        converted = to_int8(model, guarded, batches, **options)
        for tensor in converted.graph.initializer:
            if tensor.name.startswith("predictor.head"):
                tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
        return converted

    monkeypatch.setattr(convert_module, "to_int8", turned)
    with pytest.raises(ParityError, match=r"the accuracy falls from 0.9688 to .*\(limit 0.01 less\).*--precision fp32"):
        export(labelled, tmp_path, precision="int8")


def test_bf16_is_for_engines_and_proved_by_its_roundings(labelled, tmp_path, traced_once):
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


def test_a_precision_that_the_target_cannot_do_is_refused_at_once():
    with pytest.raises(ConfigError, match="'bf16' is none that ONNX Runtime can do.* fix: one of fp32, fp16, int8"):
        ExportOptions(precision="bf16")
    with pytest.raises(ConfigError, match="precision 'fp7'"):
        ExportOptions(precision="fp7")


def report(precision: str, flipped: int = 0, **figures) -> ParityReport:
    made = ParityReport("checkpoint", limits_of(precision), examples=200, positions=20_000, **figures)
    theirs = np.ones((200, 100), bool)
    theirs[:flipped, 7] = False
    made.masks.add(np.ones((200, 100), bool), theirs, np.ones((200, 100), bool))
    return made


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        ({"flipped": 100}, None),
        ({"flipped": 101}, "101 of 20000 real positions are flipped, 0.51% (limit 0.50%)"),
        ({"example_disagreements": 1}, None),
        ({"example_disagreements": 2}, "2 of 200 examples are put into another class, agreement 0.9900 (limit 0.995)"),
        ({"score_difference": 0.5, "logit_difference": 0.5, "wrong_flips": 3}, None),
        ({"score_difference": float("nan")}, "a selector score is not a finite number"),
        ({"logit_difference": float("inf")}, "a class logit on the same mask is not a finite number"),
        ({"rule_violations": 1}, "1 mask positions do not follow the decision rule"),
        ({"handover_violations": 1}, "1 rows hand other positions"),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_limits_of_half_precision(precision, figures, complaint):
    found = "; ".join(report(precision, **figures).failures())
    assert (complaint in found) if complaint else not found


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        ({"labelled": 200, "model_correct": 170, "graphs_correct": 168, "example_disagreements": 9}, None),
        ({"labelled": 200, "model_correct": 170, "graphs_correct": 167}, "falls from 0.8500 to 0.8350 (limit 0.01"),
        ({"labelled": 200, "model_correct": 170, "graphs_correct": 190}, None),
        ({"example_disagreements": 2}, None),
        ({"example_disagreements": 3}, "3 of 200 examples are put into another class, agreement 0.9850 (limit 0.99)"),
        ({"flipped": 101}, "(limit 0.50%)"),
    ],
)
def test_limits_of_int8(figures, complaint):
    found = "; ".join(report("int8", **figures).failures())
    assert (complaint in found) if complaint else not found


def test_a_selector_kept_in_fp32_keeps_fp32s_limits():
    limits = limits_of("fp32", "int8")
    assert limits.scores == 1e-4 and limits.flipped_share is None
    assert limits.logits is None and limits.accuracy_drop == 0.01
    assert limits_of("fp32") == ParityReport("file").limits


def test_a_share_of_few_examples_is_none_of_them():
    assert not ParityReport("file", limits_of("fp16"), examples=200, example_disagreements=1).failures()
    assert ParityReport("file", limits_of("fp16"), examples=200, example_disagreements=2).failures()
    assert ParityReport("file", limits_of("fp16"), examples=64, example_disagreements=1).failures()


def test_near_ties_are_one_in_a_hundred_thousand_and_a_pair_of_them_in_any_case():
    def failures(positions: int, near_ties: int) -> list[str]:
        return ParityReport("file", positions=positions, flipped_positions=near_ties, near_ties=near_ties).failures()

    assert not failures(500, 2) and not failures(310_000, 3)
    (complaint,) = failures(90_000, 3)
    assert "3 of 90000 real positions are flipped near-ties (limit 2)" in complaint


def test_masks_agree_by_jaccard_and_empty_ones_fully():
    masks = MaskAgreement()
    ours = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    theirs = np.array([[1, 0, 1, 0], [0, 0, 0, 0]], bool)
    masks.add(ours, theirs, np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool))
    assert (masks.jaccard, masks.flipped, masks.positions) == ((1 / 3 + 1) / 2, 2, 6)
    assert any("mean Jaccard index is 0.6667 (limit 0.97)" in each for each in masks.complaints(limits_of("fp16")))


def test_labels_are_read_where_every_example_has_one(labelled, rationalizer, tmp_path):
    read = parity_examples(labelled, rationalizer.preprocessor, class_names=["negative", "positive"]).labels
    assert len(read) == 64 and set(read) == {0, 1}
    assert parity_examples(labelled, rationalizer.preprocessor).labels is None
    assert parity_examples(labelled, rationalizer.preprocessor, class_names=["negative"]).labels is None
    (tmp_path / "own.txt").write_text("good plot\n")
    assert parity_examples(labelled, rationalizer.preprocessor, tmp_path / "own.txt").labels is None
