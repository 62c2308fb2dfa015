"""The exported files: their interface, what they compute at every shape, and that they are the same each time."""

import shutil

import numpy as np
import onnx
import pytest
import torch

from rekd_deploy.errors import ExportError
from rekd_deploy.export.graphs import export
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
def test_interface_is_the_signature(artefacts, role):
    model = onnx.load(getattr(artefacts, role))
    signature = getattr(artefacts.signature, role)
    kinds = {"int64": onnx.TensorProto.INT64, "float32": onnx.TensorProto.FLOAT, "bool": onnx.TensorProto.BOOL}
    for values, specs in ((model.graph.input, signature.inputs), (model.graph.output, signature.outputs)):
        tensors = [(value.name, value.type.tensor_type) for value in values]
        assert [
            (name, tensor.elem_type, tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim))
            for name, tensor in tensors
        ] == [(spec.name, kinds[spec.dtype], spec.shape) for spec in specs]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "com.microsoft": 1}
    assert model.ir_version <= 10


@pytest.mark.parametrize("role", ["selector", "predictor"])
def test_file_holds_the_computation_and_nothing_else(artefacts, role):
    content = getattr(artefacts, role).read_bytes()
    for foreign in (b"/tmp", b".py", b"site-packages", b"stack_trace", b"pkg.torch", b"pytorch"):
        assert foreign not in content
    model = onnx.load(getattr(artefacts, role))
    assert not any(entry.data_location for entry in model.graph.initializer)
    assert not model.doc_string and not model.graph.value_info


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


def test_an_answer_does_not_depend_on_its_batch_or_padding(runners, rationalizer):
    inputs = random_inputs(rationalizer.preprocessor, 6, 40)
    together = answer(runners, inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(axis=1)):
        alone = answer(runners, {name: array[row : row + 1, :length] for name, array in inputs.items()})
        np.testing.assert_array_equal(alone["mask"][0], together["mask"][row, :length])
        np.testing.assert_allclose(alone["scores"][0], together["scores"][row, :length], atol=2e-5)
        np.testing.assert_allclose(alone["logits"][0], together["logits"][row], atol=2e-5)


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


def test_same_checkpoint_gives_the_same_bytes(artefacts, checkpoint, tmp_path, fresh_graphs):
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    (tmp_path / "work").mkdir()
    again = export(copy, tmp_path / "work")
    assert again.selector.read_bytes() == artefacts.selector.read_bytes()
    assert again.predictor.read_bytes() == artefacts.predictor.read_bytes()
    assert again.manifest == artefacts.manifest


def test_an_opset_that_servers_lack_is_refused(checkpoint, tmp_path):
    with pytest.raises(ExportError, match="opset 23 is not served; opsets: 18, 19, 20"):
        export(checkpoint, tmp_path, opset=23)


def test_a_frozen_axis_is_found_and_named(artefacts):
    model = onnx.load(artefacts.selector)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(ExportError, match=r"scores float32 \[2, 'length'\], not .* \['batch', 'length'\]"):
        onnx_model.check_interface(model, artefacts.signature.selector, "selector")


def test_another_type_and_another_name_are_found(artefacts):
    model = onnx.load(artefacts.selector)
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.INT32
    with pytest.raises(ExportError, match="attention_mask int32 .* not attention_mask int64"):
        onnx_model.check_interface(model, artefacts.signature.selector, "selector")
    model.graph.input[1].name = "mask"
    with pytest.raises(ExportError, match="it has mask int32"):
        onnx_model.check_interface(model, artefacts.signature.selector, "selector")


def test_a_weight_that_is_no_number_is_refused(artefacts):
    model = onnx.load(artefacts.predictor)
    weight = next(entry for entry in model.graph.initializer if entry.name.endswith("head.1.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(ExportError, match=r"head.1.weight' of the exported predictor holds a value that is not finite"):
        onnx_model.check_constants(model, "predictor")
