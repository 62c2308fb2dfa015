"""Precision as a property of the graph: what stays float32, what overflows nowhere, and answers without neighbours."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from precisions import answers, assert_no_neighbours, conversion_of, convert, converted, model_of, traced

from rekd_deploy.errors import ExportError
from rekd_deploy.graphs import onnx_model
from rekd_deploy.graphs.half import MASKED, float_tensors, to_half
from rekd_deploy.graphs.modules import head_layers, pair_signature
from rekd_deploy.graphs.onnx_model import Structure
from rekd_deploy.graphs.precision import HEAD_OUTPUTS, guarded_nodes, multiplications, name_nodes, observed_precision
from rekd_deploy.parity.examples import constructed_inputs, made_up

pytestmark = pytest.mark.slow

NETWORKS = [("bert", True), ("bert", False), ("bert-zero", True), ("ngrams", True), ("vit", True)]
CASES = [*((kind, precision, fused) for kind, fused in NETWORKS for precision in ("fp32", "fp16", "bf16", "int8")),
         ("bilstm", "fp32", True), ("bilstm", "fp16", True)]  # fmt: skip


def every_case(*precisions: str):
    cases = [case for case in CASES if case[1] in precisions]
    return pytest.mark.parametrize(("kind", "precision", "fused"), cases)


@every_case("fp32", "fp16", "bf16", "int8")
def test_an_answer_has_no_neighbours(kind, precision, fused, texts):
    assert_no_neighbours(model_of(kind), converted(kind, precision, fused), texts)


@every_case("fp16", "bf16", "int8")
def test_the_precision_is_the_one_asked_for_and_head_and_decision_stay(kind, precision, fused):
    conversion, signature = conversion_of(kind, precision, fused), pair_signature(model_of(kind))
    heads = head_layers(model_of(kind))
    assert conversion.precisions["predictor"] == precision
    assert [role for role, kept in conversion.precisions.items() if kept != precision] == list(conversion.notes)
    for role, model in conversion.models.items():
        onnx_model.check_interface(model, signature.graph(role), role)
        onnx_model.check_constants(model, role)
        onnx.checker.check_model(model, full_check=True)
        counts = multiplications(model)
        assert observed_precision(counts, heads[role]) == conversion.precisions[role]
        assert role in conversion.notes or counts["fp32"] == heads[role], "the head, and nothing else"
    heads = head_layers(model_of(kind))
    for role, after in converted(kind, precision, fused).items():
        before, after = name_nodes(traced(kind, fused)[role]), name_nodes(after)
        guarded = guarded_nodes(before, HEAD_OUTPUTS[role], heads[role])
        assert len(guarded) > (10 if role == "selector" else 1)
        old, new = ({node.name: node for node in graph.graph.node} for graph in (before, after))
        constants, others = ({t.name: t for t in graph.graph.initializer} for graph in (before, after))
        for name in guarded:
            assert (old[name].op_type, old[name].attribute) == (new[name].op_type, new[name].attribute)
            for first, second in zip(old[name].input, new[name].input, strict=True):
                assert first not in constants or first == second and constants[first] == others[second]
        reached = {HEAD_OUTPUTS[role]}
        for node in after.graph.node:
            if reached & set(node.input):
                assert node.name in guarded, "nothing was put between the scores and the outputs"
                reached |= set(node.output)


def test_what_stays_float32_and_what_cannot_be_converted():
    conversion = conversion_of("vit", "int8", True)
    assert conversion.precisions == {"selector": "fp32", "predictor": "int8"}
    assert "8 of 768 real positions are flipped, 1.04% (limit 0.50%)" in conversion.notes["selector"]
    assert conversion.models["selector"] == name_nodes(traced("vit", True)["selector"])
    assert conversion_of("bert", "int8", True).precisions == {"selector": "int8", "predictor": "int8"}
    model = converted("bert", "fp16", False)["selector"]
    structure, floats = Structure(model), float_tensors(model)
    alone = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert alone
    for node in alone:
        assert {node.input[0], node.output[0], *structure.producers[node.input[0]].input} <= floats
    model = two_layers(1e6)
    guarded = guarded_nodes(model, "logits", 1)
    with pytest.raises(ExportError, match=r"'w0' holds 1e\+06, fp16 ends at 65504 .* fix: --precision bf16 or fp32"):
        to_half(model, "fp16", guarded)
    to_half(model, "bf16", guarded)
    assert len(guarded_nodes(model, "logits", 2)) == 2
    with pytest.raises(ExportError, match="no head with 3 linear layers leads to 'logits'"):
        guarded_nodes(model, "logits", 3)
    for precision in ("bf16", "int8"):  # recurrent layers have no kernels for them
        with pytest.raises(ExportError, match="fix: --precision f"):
            convert("bilstm", precision)
    for precision in ("fp16", "bf16", "int8"):  # the same bytes each time
        first, second = convert("bert", precision).models, conversion_of("bert", precision, True).models
        for role in first:
            one, other = (models[role].SerializeToString(deterministic=True) for models in (first, second))
            assert one == other, role
    counts = {"fp32": 9}, {"fp16": 8, "fp32": 1}, {"fp16": 8, "fp32": 2}, {"fp16": 8, "int8": 2}
    assert [observed_precision(each, 1) for each in counts] == ["fp32", "fp16", "mixed", "mixed"]


@every_case("fp16", "bf16")
def test_half_precision_holds_no_constant_beyond_it_and_the_decision_keeps_its_own(kind, precision, fused):
    for role, model in conversion_of(kind, precision, fused).models.items():
        constants = [(tensor.data_type, numpy_helper.to_array(tensor)) for tensor in model.graph.initializer]
        halves = [values for type, values in constants if type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)]
        assert len(halves) > 5
        for values in (values.astype(np.float32) for values in halves):
            assert np.isfinite(values).all() and (values >= MASKED * 1.01).all()
        singles = [values for type, values in constants if type == TensorProto.FLOAT and values.shape == ()]
        below = np.finfo(np.float32).min in singles
        assert below or role == "predictor", "unselectable positions still rank below every score"


@pytest.mark.parametrize(("kind", "fused"), NETWORKS)
def test_nothing_overflows_in_half_precision(kind, fused):
    """Every tensor in between, on padded, shortest and longest inputs; a mask that became -inf would show."""
    model, probe = model_of(kind), onnx.ModelProto()
    probe.CopyFrom(converted(kind, "fp16", fused)["selector"])
    structure = Structure(probe)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in structure.producers.keys() - structure.outputs)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    for inputs in constructed_inputs(model.preprocessor, model.policy, model.capacity):
        for value, array in zip(session.get_outputs(), session.run(None, inputs), strict=True):
            assert array.dtype.kind != "f" or np.isfinite(array).all(), value.name


def two_layers(largest: float) -> onnx.ModelProto:
    """The first weight holds that number."""
    return name_nodes(onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 1] x) => (float[batch, 2] logits)
        <float[1, 2] w0 = {{{largest}, 1.0}}, float[2, 2] w1 = {{1.0, 1.0, 1.0, 1.0}}>
        {{ a = MatMul(x, w0)
          logits = MatMul(a, w1) }}"""))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_emulation_rounds_as_the_kernels_do(kind):
    """fp16 exists both ways on a CPU; bf16 is rounded the same way, only coarser."""
    model, heads = model_of(kind), head_layers(model_of(kind))
    emulated = {}
    for role, graph in traced(kind, True).items():
        named = name_nodes(graph)
        emulated[role] = to_half(named, "fp16", guarded_nodes(named, HEAD_OUTPUTS[role], heads[role]), emulated=True)
    pairs = (traced(kind, True), converted(kind, "fp16", True), emulated, converted(kind, "bf16", True))
    exact, *others = (answers(model, graphs, made_up(model.preprocessor)[:16])["scores"] for graphs in pairs)
    kernels, stand_in, coarse = (float(np.abs(scores - exact).mean()) for scores in others)
    assert 0.3 < stand_in / kernels < 3, "the same size of error"
    assert coarse > 3 * stand_in, "three bits fewer"
