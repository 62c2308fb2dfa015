"""The gate lets the model's own graphs through and nothing else."""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from rekd_deploy.contract.parity_report import MaskAgreement, ParityReport, limits_of
from rekd_deploy.errors import ParityError
from rekd_deploy.parity.examples import Examples, parity_examples
from rekd_deploy.parity.gate import check_parity
from rekd_deploy.parity.reference import agreement, in_slots
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Patch, Piece, Prediction, Span


@pytest.fixture
def sabotaged(artefacts, tmp_path):
    def change(role: str, action) -> dict:
        model = onnx.load(artefacts.graphs[role])
        action(model)
        onnx.save(model, tmp_path / f"{role}.onnx")
        return artefacts.graphs | {role: tmp_path / f"{role}.onnx"}
    return change


def rewritten(tensor, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def scaled(suffix: str, factor: float):
    def action(model):
        tensor = next(entry for entry in model.graph.initializer if entry.name.endswith(suffix))
        rewritten(tensor, numpy_helper.to_array(tensor) * np.float32(factor))
    return action


def constant_replaced(old: float, new: float, slots: bool = False):
    def action(model):
        (tensor,) = (
            entry for entry in model.graph.initializer
            if entry.name.startswith("slots/") == slots and entry.data_type != onnx.TensorProto.BOOL
            and (array := numpy_helper.to_array(entry)).size == 1 and np.isclose(array.item(), old, rtol=1e-6))
        rewritten(tensor, np.full_like(numpy_helper.to_array(tensor), new))
    return action


def reversed_running_counts(model):
    """Ties go to the higher index."""
    compared = {name for node in model.graph.node if node.op_type == "LessOrEqual" for name in node.input}
    counts = [node for node in model.graph.node if node.op_type == "CumSum" and node.output[0] in compared]
    assert counts, "the running counts among equal scores"
    for node in counts:
        next(attribute for attribute in node.attribute if attribute.name == "reverse").i = 1


def increased(output: str, by: np.ndarray):
    def action(model):
        node = next(node for node in model.graph.node if output in node.output)
        place = list(model.graph.node).index(node) + 1
        node.output[list(node.output).index(output)] = "before"
        model.graph.initializer.append(numpy_helper.from_array(by, "increase"))
        model.graph.node.insert(place, onnx.helper.make_node("Add", ["before", "increase"], [output]))
    return action


def test_the_models_own_graphs_pass_and_masks_are_handed_over_in_slots(rationalizer, artefacts, texts):
    report = check_parity(rationalizer, artefacts.graphs, Examples(texts, "file"))
    assert report.failures() == []
    assert report.examples == len(texts) and report.constructed_rows > 100 and report.positions > report.examples
    assert 0 < report.score_difference <= 1e-4 and report.logit_difference <= 1e-4
    assert report.flipped_positions == report.rule_violations == report.handover_violations == 0
    assert report.label_disagreements == 0
    json.dumps(report.to_dict(), allow_nan=False)
    found = in_slots(np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool), 3)
    assert found["positions"].tolist() == [[1, 3, 0], [0, 0, 0], [0, 1, 2]]
    assert found["kept"].tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert in_slots(np.array([[False, True]]), 3)["positions"].tolist() == [[1, 0, 0]], "more slots than positions"
    limits = limits_of("fp32", "int8")
    assert (limits.scores, limits.flipped_share, limits.logits, limits.accuracy_drop) == (1e-4, None, None, 0.01)
    masks = MaskAgreement()
    ours, theirs = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool), np.array([[1, 0, 1, 0], [0, 0, 0, 0]], bool)
    masks.add(ours, theirs, np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool))
    assert (masks.jaccard, masks.flipped, masks.positions) == ((1 / 3 + 1) / 2, 2, 6)
    assert any("mean Jaccard index is 0.6667 (limit 0.97)" in each for each in masks.complaints(limits_of("fp16")))


@pytest.mark.parametrize(("role", "action", "complaint"), [
    ("selector", scaled("word_embeddings.weight", 1.001), "a selector score differs by"),
    ("selector", constant_replaced(0.1, 0.7), "do not follow the decision rule"),  # the bias
    ("selector", constant_replaced(250000, 300000), "do not follow the decision"),  # the budget
    ("selector", constant_replaced(250000, 220000, True), "rows hand other positions"),  # the slots
    ("selector", reversed_running_counts, "mask positions do not follow the decision rule"),
    ("selector", increased("positions", np.array(1)), "rows hand other positions to the predictor"),
    ("predictor", scaled("head.1.weight", 1.001), "a class logit on the same mask differs"),
    ("predictor", constant_replaced(1.3, 1.31), "a probability on the"),  # the temperature
    ("predictor", scaled("head.1.bias", float("nan")), "differs by nan"),
], ids=["weight", "bias", "budget", "slots", "ties", "handover", "head", "temperature", "nan"])
def test_a_graph_that_computes_something_else_is_refused(rationalizer, sabotaged, texts, role, action, complaint):
    with pytest.raises(ParityError, match=rf"not published.*{complaint}.*\(limit"):
        check_parity(rationalizer, sabotaged(role, action), Examples(texts, "file"))


@pytest.mark.parametrize("distance", [6e-6, 3e-5])
def test_a_flip_close_to_the_cut_is_tolerated_and_counted(rationalizer, sabotaged, distance):
    """The model's threshold lies so far below a text's second-best score; the graph scores lower by twice that."""
    text = "good plot and awful actor in a dark story with great scenes and the end"
    inputs = {name: torch.from_numpy(array) for name, array in rationalizer.preprocessor([text]).inputs.items()}
    with torch.inference_mode():
        scores = rationalizer.select(inputs).scores[0][rationalizer.selectable(inputs)[0]]
    moved, bias = copy.copy(rationalizer), float(distance - torch.sort(scores, descending=True).values[1])
    moved.policy = rationalizer.policy.model_copy(update={"bias": bias})
    def lower(model):
        constant_replaced(0.1, bias)(model)
        increased("scores", np.array(-2 * distance, np.float32))(model)
    given = moved, sabotaged("selector", lower), Examples([text], "file")
    if distance > 1e-5:
        with pytest.raises(ParityError, match="1 mask positions are flipped farther than 1e-05 from the cut"):
            check_parity(*given)
    else:
        report = check_parity(*given)
        assert report.flipped_positions == report.near_ties == 1 and report.wrong_flips == 0


def complaints(precision: str, flipped: int = 0, **figures) -> str:
    made = ParityReport("checkpoint", limits_of(precision), **{"examples": 200, "positions": 20_000} | figures)
    theirs = np.ones((200, 100), bool)
    theirs[:flipped, 7] = False
    made.masks.add(np.ones((200, 100), bool), theirs, np.ones((200, 100), bool))
    return "; ".join(made.failures())


NAN, LABELLED = float("nan"), {"labelled": 200, "model_correct": 170}


@pytest.mark.parametrize(("precision", "figures", "complaint"), [
    ("fp32", {}, None),
    ("fp32", {"logit_difference": NAN}, "a class logit on the same mask differs by nan"),
    ("fp32", {"positions": 500, "near_ties": 2}, None), ("fp32", {"positions": 310_000, "near_ties": 3}, None),
    ("fp32", {"positions": 90_000, "near_ties": 3}, "3 of 90000 real positions are flipped near-ties (limit 2)"),
    ("fp16", {"flipped": 100}, None),
    ("fp16", {"flipped": 101}, "101 of 20000 real positions are flipped, 0.51% (limit 0.50%)"),
    ("bf16", {"flipped": 101}, "(limit 0.50%)"), ("fp16", {"example_disagreements": 1}, None),
    ("fp16", {"example_disagreements": 2}, "2 of 200 examples are put into another class, agreement 0.9900"),
    ("fp16", {"examples": 64, "example_disagreements": 1}, "(limit 0.995)"),
    ("fp16", {"score_difference": 0.5, "logit_difference": 0.5, "wrong_flips": 3}, None),
    ("fp16", {"score_difference": NAN}, "a selector score is not a finite number"),
    ("fp16", {"logit_difference": float("inf")}, "a class logit on the same mask is not a finite number"),
    ("fp16", {"rule_violations": 1}, "1 mask positions do not follow the decision rule"),
    ("fp16", {"handover_violations": 1}, "1 rows hand other positions"),
    ("int8", {**LABELLED, "graphs_correct": 168, "example_disagreements": 9}, None),
    ("int8", {**LABELLED, "graphs_correct": 167}, "falls from 0.8500 to 0.8350 (limit 0.01"),
    ("int8", {**LABELLED, "graphs_correct": 190}, None), ("int8", {"example_disagreements": 2}, None),
    ("int8", {"example_disagreements": 3}, "3 of 200 examples are put into another class, agreement 0.9850 (limit"),
    ("int8", {"flipped": 101}, "(limit 0.50%)")])
def test_limits(precision, figures, complaint):
    found = complaints(precision, **figures)
    assert (complaint in found) if complaint else not found


def test_texts_come_from_the_file_else_the_checkpoint_else_the_vocabulary(rationalizer, tmp_path):
    def found(*file):
        return parity_examples(tmp_path, rationalizer.preprocessor, *file)
    made = found()
    assert made.source == "generated" and made == found()
    encoded = rationalizer.preprocessor(made.items)
    assert any(encoded.truncated) and min(len(encoding.ids) for encoding in encoded.encodings) == 3
    (tmp_path / "examples.jsonl").write_text("")
    assert found().source == "generated", "an empty file is none"
    (tmp_path / "examples.jsonl").write_text('{"text": "good", "label": "positive"}\n' * 300)
    assert found() == Examples(["good"] * 200, "checkpoint")
    (tmp_path / "mine.txt").write_text("bad plot\n\n  good\u2028plot \n", encoding="utf-8")
    assert found(tmp_path / "mine.txt") == Examples(["bad plot", "good\u2028plot"], "file")
    (tmp_path / "texts.jsonl").write_text('{"text": "good"}\n{"review": "bad"}')
    with pytest.raises(InputError, match="texts.jsonl: line 2 is not a JSON object"):
        found(tmp_path / "texts.jsonl")
    (tmp_path / "mine.csv").write_text("text,label\ngood film,b\nbad film,a\n")
    for names, labels in ((("a", "b"), [1, 0]), (("b", "c"), None), ((), None)):
        given = parity_examples(tmp_path, rationalizer.preprocessor, tmp_path / "mine.csv", class_names=names)
        assert given == Examples(["good film", "bad film"], "file", labels)


def text(*scores: float, probability: float = 0.9) -> Prediction:
    """One kept token a score; position i has scores[i]; 0 stands for a token that is not kept."""
    pieces = [Piece(2 * i, 2 * i + 1, "x", i, score) for i, score in enumerate(scores) if score]
    spans = [Span(piece.start, piece.end, "x", piece.score) for piece in pieces]
    return Prediction("good", {"good": probability, "bad": 1 - probability}, spans, 0.1, False, pieces=pieces)


def image(*scores: float) -> Prediction:
    """The same of patches in row 0."""
    patches = [Patch(0, i, (i, 0, i + 1, 1), score) for i, score in enumerate(scores) if score]
    return Prediction("shoe", {"shoe": 1.0}, patches, 0.1, False)


TWO = text(1, 2)


@pytest.mark.parametrize(("mine", "other", "bias", "agrees"), [
    (TWO, text(1, 2), None, True), (TWO, replace(TWO, label="bad"), None, False),
    (TWO, replace(TWO, truncated=True), None, False), (TWO, replace(TWO, rationale=TWO.rationale[:1]), None, False),
    (TWO, text(1, 2, probability=0.9002), None, False), (TWO, text(1, 2, probability=0.90005), None, True),
    (text(3, 2, 1), text(3, 2, 0), 0.5, False),  # the lowest one is missing
    (text(3, 0.500001), text(3, 0), -0.5, True),  # at the threshold
    (text(3, 0.51), text(3, 0), -0.5, False),
    (text(3, 1, 0), text(3, 0, 1.000001), None, True),  # almost equal scores have changed places
    (text(3, 1, 0), text(3, 0, 1.1), None, False),
    (image(3, 1), image(3, 1), None, True), (image(3, 1, 0), image(3, 0, 1.000001), None, True),
    (image(3, 1, 0), image(3, 0, 1.1), None, False), (image(3, 1), image(3, 0), 0.5, False)])
def test_predictions_agree_up_to_near_ties(mine, other, bias, agrees):
    assert agreement([mine], [other], bias=bias) == agrees
