"""The exported files: their interface, what they compute at every shape, and that they are the same each time."""


import numpy as np
import onnx
import pytest
import torch

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs import onnx_model
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner


@pytest.fixture(scope="module")
def runners(artefacts):
    with (
        OnnxRuntimeRunner(artefacts.selector, artefacts.signature.selector, "selector") as selector,
        OnnxRuntimeRunner(artefacts.predictor, artefacts.signature.predictor, "predictor") as predictor,
    ):
        yield selector, predictor


def random_inputs(preprocessor, batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different lengths, [CLS] words [SEP] padding; the first one is full."""
    generator = np.random.default_rng(seed)
    special = preprocessor.special_ids
    counts = [length - 2, *generator.integers(1, length - 1, batch - 1)]
    rows = [[special["cls"], *generator.integers(4, 94, count).tolist(), special["sep"]] for count in counts]
    return preprocessor.pad(rows, length)


def answer(runners, inputs):
    selector, predictor = runners
    chosen = selector.run(inputs)
    handed_over = {name: chosen[name] for name in ("positions", "kept")}
    return {**chosen, **predictor.run({"input_ids": inputs["input_ids"], **handed_over})}


@pytest.mark.parametrize("role", ["selector", "predictor"])
def test_file_holds_the_computation_and_nothing_else(artefacts, role):
    content = getattr(artefacts, role).read_bytes()
    for foreign in (b"/tmp", b".py", b"site-packages", b"stack_trace", b"pkg.torch", b"pytorch"):
        assert foreign not in content
    model = onnx.load(getattr(artefacts, role))
    assert not any(entry.data_location for entry in model.graph.initializer)
    assert not model.doc_string and not model.graph.value_info and model.ir_version <= 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "com.microsoft": 1}


def test_every_length_and_batch_size_is_answered_as_by_the_model(artefacts, runners, rationalizer):
    lengths = range(3, 49)
    slots = artefacts.signature.predictor.slots
    assert (slots.at(3), slots.at(48)) == (1, 11), "few slots for short texts, for the longest K"
    for length in lengths:
        batch = (1, 2, 5)[length % 3]
        inputs = random_inputs(rationalizer.preprocessor, batch, length, seed=length)
        answers = answer(runners, inputs)
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.inference_mode():
            selection = rationalizer.select(tensors)
            logits = rationalizer.class_logits(tensors, selection.mask)
        np.testing.assert_allclose(answers["scores"], selection.scores.numpy(), atol=1e-4)
        np.testing.assert_array_equal(answers["mask"], selection.mask.numpy())
        assert answers["positions"].shape == answers["kept"].shape == (batch, slots.at(length))
        assert (answers["kept"].sum(axis=1) == answers["mask"].sum(axis=1)).all()
        np.testing.assert_allclose(answers["logits"], logits.numpy(), atol=1e-4)
        np.testing.assert_allclose(answers["probabilities"], rationalizer.probabilities(logits).numpy(), atol=1e-4)


def test_swap_the_predictor_sees_nothing_but_the_rationale(runners, rationalizer):
    """The content of every unselected token is changed while the mask is held: the logits stay, bit by bit."""
    selector, predictor = runners
    inputs = random_inputs(rationalizer.preprocessor, 5, 48)
    chosen = selector.run(inputs)
    handed_over = {name: chosen[name] for name in ("positions", "kept")}
    before = predictor.run({"input_ids": inputs["input_ids"], **handed_over})
    held = chosen["mask"].copy()
    held[:, 0] = True  # [CLS] is always there
    swapped = np.where(held, inputs["input_ids"], (inputs["input_ids"] + 37) % 94)
    assert (swapped != inputs["input_ids"]).sum() > 100
    after = predictor.run({"input_ids": swapped, **handed_over})
    for name in ("logits", "probabilities"):
        np.testing.assert_array_equal(after[name].view(np.int32), before[name].view(np.int32))
    kept_word = tuple(np.argwhere(chosen["mask"])[0])
    swapped[kept_word] = (swapped[kept_word] + 37) % 94
    moved = predictor.run({"input_ids": swapped, **handed_over})
    assert np.abs(moved["logits"] - before["logits"]).max() > 1e-3, "and the rationale itself does matter"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda graph: setattr(graph.output[0].type.tensor_type.shape.dim[0], "dim_value", 2),
         r"scores float32 \[2, 'length'\], not .* \['batch', 'length'\]"),
        (lambda graph: setattr(graph.input[1].type.tensor_type, "elem_type", onnx.TensorProto.INT32),
         "attention_mask int32 .* not .*attention_mask int64"),
        (lambda graph: setattr(graph.input[1], "name", "mask"), "it has .*mask int64"),
    ],
)
def test_another_interface_is_found_and_named(artefacts, change, complaint):
    model = onnx.load(artefacts.selector)
    change(model.graph)
    with pytest.raises(ExportError, match=complaint):
        onnx_model.check_interface(model, artefacts.signature.selector, "selector")


def test_a_weight_that_is_no_number_is_refused(artefacts):
    model = onnx.load(artefacts.predictor)
    weight = next(entry for entry in model.graph.initializer if entry.name.endswith("head.1.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(ExportError, match=r"head.1.weight' of the exported predictor holds a value that is not finite"):
        onnx_model.check_constants(model, "predictor")
