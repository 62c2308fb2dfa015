"""The gate lets the model's own graphs through and nothing else."""

import copy
import json
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from rekd_deploy.contract.parity_report import ParityReport
from rekd_deploy.errors import ParityError
from rekd_deploy.parity.examples import Examples, parity_examples
from rekd_deploy.parity.gate import check_parity
from rekd_train.errors import InputError


@pytest.fixture(scope="module")
def examples(texts) -> Examples:
    return Examples(texts, "file")


@pytest.fixture
def sabotaged(artefacts, tmp_path) -> Callable:
    """Copies of the graphs, one of them changed."""

    def change(role: str, action: Callable[[onnx.ModelProto], None]) -> dict:
        model = onnx.load(getattr(artefacts, role))
        action(model)
        path = tmp_path / f"{role}.onnx"
        path.write_bytes(model.SerializeToString())
        return {"selector": artefacts.selector, "predictor": artefacts.predictor, role: path}

    return change


def scaled(suffix: str, factor: float):
    def action(model):
        tensor = next(entry for entry in model.graph.initializer if entry.name.endswith(suffix))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))

    return action


def constant_replaced(old: float, new: float, dtype, slots: bool = False):
    def action(model):
        tensors = [
            entry
            for entry in model.graph.initializer
            if entry.data_type == dtype and numpy_helper.to_array(entry).size == 1
            and entry.name.startswith("slots/") == slots
            and np.isclose(numpy_helper.to_array(entry).item(), old)
        ]
        assert len(tensors) == 1, "the constant that the test means"
        array = numpy_helper.to_array(tensors[0])
        tensors[0].CopyFrom(numpy_helper.from_array(np.full_like(array, new), tensors[0].name))

    return action


def reversed_running_counts(model):
    """Ties go to the higher index."""
    compared = {name for node in model.graph.node if node.op_type == "LessOrEqual" for name in node.input}
    counts = [node for node in model.graph.node if node.op_type == "CumSum" and node.output[0] in compared]
    assert counts, "the running counts among equal scores"
    for node in counts:
        next(attribute for attribute in node.attribute if attribute.name == "reverse").i = 1


def last_position_shifted(model):
    """The predictor is handed the neighbour of each kept token."""
    node = next(node for node in model.graph.node if "positions" in node.output)
    node.output[0] = "true_positions"
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one_more"))
    model.graph.node.append(onnx.helper.make_node("Add", ["true_positions", "one_more"], ["positions"]))


def logits_without_a_number(model):
    scaled("head.1.bias", float("nan"))(model)


FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def test_the_models_own_graphs_pass(rationalizer, artefacts, examples):
    report = check_parity(rationalizer, artefacts.graphs, examples)
    assert report.failures() == []
    assert report.examples == len(examples.items) and report.constructed_rows > 100
    assert report.positions > report.examples
    assert 0 < report.score_difference <= 1e-4 and report.logit_difference <= 1e-4
    assert report.flipped_positions == report.rule_violations == report.handover_violations == 0
    assert report.label_disagreements == 0
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("role", "action", "complaint"),
    [
        pytest.param("selector", scaled("word_embeddings.weight", 1.001), "a selector score differs by", id="weight"),
        pytest.param("selector", constant_replaced(0.1, 0.7, FLOAT), "do not follow the decision rule", id="bias"),
        pytest.param("selector", constant_replaced(250000, 300000, INT64), "do not follow the decision", id="budget"),
        pytest.param(
            "selector", constant_replaced(250000, 220000, INT64, slots=True), "rows hand other positions", id="slots"
        ),
        pytest.param("selector", reversed_running_counts, "mask positions do not follow the decision rule", id="ties"),
        pytest.param("selector", last_position_shifted, "rows hand other positions to the predictor", id="handover"),
        pytest.param("predictor", scaled("head.1.weight", 1.001), "a class logit on the same mask differs", id="head"),
        pytest.param("predictor", constant_replaced(1.3, 1.31, FLOAT), "a probability on the", id="temperature"),
        pytest.param("predictor", logits_without_a_number, "differs by nan", id="nan"),
    ],
)
def test_a_graph_that_computes_something_else_is_refused(
    rationalizer, sabotaged, examples, role, action, complaint
):
    graphs = sabotaged(role, action)
    with pytest.raises(ParityError, match=complaint) as refusal:
        check_parity(rationalizer, graphs, examples)
    assert "(limit" in str(refusal.value) and "not published" in str(refusal.value)


def near_the_cut(rationalizer, distance: float):
    """The model with its threshold moved to ``distance`` below the second-best score of a text."""
    text = "good plot and awful actor in a dark story with great scenes and the end"
    inputs = {name: torch.from_numpy(array) for name, array in rationalizer.preprocessor([text]).inputs.items()}
    with torch.inference_mode():
        scores = rationalizer.select(inputs).scores[0]
    best = torch.sort(scores[rationalizer.selectable(inputs)[0]], descending=True).values
    moved = copy.copy(rationalizer)
    moved.policy = rationalizer.policy.model_copy(update={"bias": float(distance - best[1])})
    return moved, Examples([text], "file")


def scores_lowered(by: float, bias: float):
    """Every score of the graph is ``by`` lower; the decision rule is right."""

    def action(model):
        constant_replaced(0.1, bias, FLOAT)(model)
        node = next(node for node in model.graph.node if "scores" in node.output)
        node.output[0] = "true_scores"
        model.graph.initializer.append(numpy_helper.from_array(np.array(by, np.float32), "lowered_by"))
        place = list(model.graph.node).index(node) + 1
        model.graph.node.insert(place, onnx.helper.make_node("Sub", ["true_scores", "lowered_by"], ["scores"]))

    return action


def test_a_flip_close_to_the_cut_is_tolerated_counted_and_listed(rationalizer, sabotaged):
    moved, examples = near_the_cut(rationalizer, 6e-6)
    graphs = sabotaged("selector", scores_lowered(1.2e-5, moved.policy.bias))
    report = check_parity(moved, graphs, examples)
    assert report.flipped_positions == report.near_ties == 1 and report.wrong_flips == 0


def test_a_flip_farther_from_the_cut_is_refused(rationalizer, sabotaged):
    moved, examples = near_the_cut(rationalizer, 3e-5)
    graphs = sabotaged("selector", scores_lowered(6e-5, moved.policy.bias))
    with pytest.raises(ParityError, match="1 mask positions are flipped farther than 1e-05 from the cut"):
        check_parity(moved, graphs, examples)


def test_differences_that_are_no_numbers_never_pass():
    assert ParityReport("file", logit_difference=float("nan")).failures()
    assert not ParityReport("file").failures()


def test_texts_come_from_the_file_else_the_checkpoint_else_the_vocabulary(rationalizer, tmp_path):
    made = parity_examples(tmp_path, rationalizer.preprocessor)
    assert made.source == "generated" and made == parity_examples(tmp_path, rationalizer.preprocessor)
    encoded = rationalizer.preprocessor(made.items)
    assert any(encoded.truncated) and min(len(encoding.ids) for encoding in encoded.encodings) == 3
    (tmp_path / "examples.jsonl").write_text("")
    assert parity_examples(tmp_path, rationalizer.preprocessor).source == "generated", "an empty file is none"
    (tmp_path / "examples.jsonl").write_text('{"text": "good", "label": "positive"}\n' * 300)
    own = parity_examples(tmp_path, rationalizer.preprocessor)
    assert own == Examples(["good"] * 200, "checkpoint")
    (tmp_path / "mine.txt").write_text("bad plot\n\n  good\u2028plot \n", encoding="utf-8")
    given = parity_examples(tmp_path, rationalizer.preprocessor, tmp_path / "mine.txt")
    assert given == Examples(["bad plot", "good\u2028plot"], "file")
    (tmp_path / "mine.csv").write_text("text,label\ngood film,b\nbad film,a\n")
    for names, labels in ((("a", "b"), [1, 0]), (("b", "c"), None)):
        given = parity_examples(tmp_path, rationalizer.preprocessor, tmp_path / "mine.csv", class_names=names)
        assert given == Examples(["good film", "bad film"], "file", labels)


def test_a_file_of_texts_that_cannot_be_used_is_named_with_its_line(rationalizer, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "good"}\n{"review": "bad"}')
    with pytest.raises(InputError, match="texts.jsonl: line 2 is not a JSON object"):
        parity_examples(tmp_path, rationalizer.preprocessor, tmp_path / "texts.jsonl")
    with pytest.raises(InputError, match="nowhere.txt cannot be read"):
        parity_examples(tmp_path, rationalizer.preprocessor, tmp_path / "nowhere.txt")
