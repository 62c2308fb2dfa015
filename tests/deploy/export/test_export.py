"""The exported files: their interface, and what they compute at every shape."""

import numpy as np
import onnx
import pytest
import torch

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs import onnx_model
from rekd_deploy.runtimes.base import Graph
from rekd_deploy.runtimes.onnxruntime_device import chain_on


@pytest.mark.parametrize("role", ["selector", "predictor"])
def test_file_holds_the_computation_and_nothing_else(artefacts, role):
    content = artefacts.graphs[role].read_bytes()
    for foreign in (b"/tmp", b".py", b"site-packages", b"stack_trace", b"pkg.torch", b"pytorch"):
        assert foreign not in content
    model = onnx.load_from_string(content)
    assert not any(entry.data_location for entry in model.graph.initializer)
    assert not model.doc_string and not model.graph.value_info and model.ir_version <= 10
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "com.microsoft": 1}


def test_every_length_and_batch_size_is_answered_as_by_the_model(artefacts, rationalizer):
    slots, special = artefacts.signature.predictor.slots, rationalizer.preprocessor.special_ids
    assert (slots.at(3), slots.at(48)) == (1, 11), "few slots for short texts, for the longest K"
    graphs = [Graph(path, artefacts.signature.graph(role), role) for role, path in artefacts.graphs.items()]
    with chain_on(graphs) as chain:
        for length in range(3, 49):
            # rows of different lengths, [CLS] words [SEP] padding; the first one is full
            generator, batch = np.random.default_rng(length), (1, 2, 5)[length % 3]
            counts = [length - 2, *generator.integers(1, length - 1, batch - 1)]
            rows = [[special["cls"], *generator.integers(4, 94, count), special["sep"]] for count in counts]
            inputs = rationalizer.preprocessor.pad(rows, length)
            answers, tensors = chain.run(inputs), {name: torch.from_numpy(each) for name, each in inputs.items()}
            with torch.inference_mode():
                selection = rationalizer.select(tensors)
                logits = rationalizer.class_logits(tensors, selection.mask)
            np.testing.assert_allclose(answers["scores"], selection.scores.numpy(), atol=1e-4)
            np.testing.assert_array_equal(answers["mask"], selection.mask.numpy())
            assert answers["positions"].shape == answers["kept"].shape == (batch, slots.at(length))
            assert (answers["kept"].sum(axis=1) == answers["mask"].sum(axis=1)).all()
            np.testing.assert_allclose(answers["logits"], logits.numpy(), atol=1e-4)
            np.testing.assert_allclose(answers["probabilities"], rationalizer.probabilities(logits).numpy(), atol=1e-4)


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda graph: setattr(graph.output[0].type.tensor_type.shape.dim[0], "dim_value", 2),
     r"scores float32 \[2, 'length'\], not .* \['batch', 'length'\]"),
    (lambda graph: setattr(graph.input[1].type.tensor_type, "elem_type", onnx.TensorProto.INT32),
     "attention_mask int32 .* not .*attention_mask int64"),
    (lambda graph: setattr(graph.input[1], "name", "mask"), "it has .*mask int64")])
def test_another_interface_and_weights_that_are_no_numbers_are_named(artefacts, change, complaint):
    model = onnx.load(artefacts.selector)
    change(model.graph)
    with pytest.raises(ExportError, match=complaint):
        onnx_model.check_interface(model, artefacts.signature.selector, "selector")
    model = onnx.load(artefacts.predictor)
    weight = next(entry for entry in model.graph.initializer if entry.name.endswith("head.1.weight"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(ExportError, match=r"head.1.weight' of the exported predictor holds a value that is not finite"):
        onnx_model.check_constants(model, "predictor")
