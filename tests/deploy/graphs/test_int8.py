"""int8: constant scales, rewritings that compute the same, and products that every processor adds exactly."""

import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper
from precisions import answers, conversion_of, convert, converted, model_of, traced

from rekd_deploy.contract.signature import BATCH, GraphSignature, TensorSpec
from rekd_deploy.errors import ExportError
from rekd_deploy.graphs import precision as precision_module
from rekd_deploy.graphs.fusion import norms_apart
from rekd_deploy.graphs.int8 import best_range, quantised_weight, split_attention
from rekd_deploy.graphs.precision import without_padding
from rekd_deploy.parity.examples import made_up
from rekd_deploy.repository.backend.graphs import OnnxGraph
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner

pytestmark = pytest.mark.slow

MULTIPLIED = {"selector": 6, "predictor": 12}


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("role", MULTIPLIED)
@pytest.mark.parametrize("fused", [True, False])
def test_scales_and_zero_points_are_constants(fused, role):
    """Zero points that are left out: older releases of ONNX Runtime abort on some processors."""
    model = conversion_of("bert", "int8", fused).models[role]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {"QuantizeLinear": 0, "DequantizeLinear": 0, "MatMulIntegerToFloat": 0}
    for node in (node for node in model.graph.node if node.op_type in found):
        found[node.op_type] += 1
        assert node.op_type == "DequantizeLinear" or all(name in constants for name in node.input[1:])
        assert all(constants[name].dtype == np.float32 for name in node.input if name.endswith("/scale"))
        if node.op_type == "MatMulIntegerToFloat":
            _, weight, _, columns, _, zero = (constants.get(name) for name in node.input[:6])
            assert len(columns) == weight.shape[1] and zero == 0 and zero.dtype == weight.dtype == np.int8
    assert found["MatMulIntegerToFloat"] == (MULTIPLIED[role] if fused else 0)
    assert found["DequantizeLinear"] == (0 if fused else found["QuantizeLinear"] + MULTIPLIED[role])
    if fused and role == "predictor":  # the fast operators alone
        assert not {"SkipLayerNormalization", "Attention", "BiasGelu"} & {*operators(model)}
        assert {"MultiHeadAttention", "LayerNormalization", "Gelu"} <= {*operators(model)}


def test_fused_and_unfused_round_alike_and_norms_stay_apart(texts, tmp_path):
    fused, plain = (answers(model_of("bert"), converted("bert", "int8", each), texts) for each in (True, False))
    np.testing.assert_allclose(fused["logits"], plain["logits"], atol=2e-2)
    np.testing.assert_array_equal(fused["mask"], plain["mask"])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 4
    model = norms_apart(traced("bert", True)["selector"])
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert "SkipLayerNormalization" not in operators(onnx.load(tmp_path / "optimised.onnx"))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_attention_and_norms_taken_apart_compute_the_same(kind):
    model = model_of(kind)
    apart = {role: norms_apart(split_attention(graph)) for role, graph in traced(kind, True).items()}
    for graph in apart.values():
        assert not {"SkipLayerNormalization", "Attention"} & {*operators(graph)}
        onnx.checker.check_model(graph, full_check=True)
    before, after = (answers(model, graphs, made_up(model.preprocessor)[:5]) for graphs in (traced(kind, True), apart))
    for name in ("scores", "logits"):
        np.testing.assert_allclose(before[name], after[name], atol=5e-5)
    np.testing.assert_array_equal(before["mask"], after["mask"])


def test_calibration_takes_a_part_and_ranges_hold_zero(monkeypatch):
    values = np.concatenate([np.linspace(-1, 3, 100_000), [12.0]]).astype(np.float32)
    found = best_range(values)
    assert found.scale * 255 < 12.5 and found.scale * (255 - int(found.zero_point)) > 3
    ends = [best_range(np.linspace(*ends, 10, dtype=np.float32)).zero_point for ends in ((2, 3), (-3, -2))]
    assert ends == [0, 255] and best_range(np.zeros(4, np.float32)).scale > 0
    weight = np.array([[1.0, 100.0, 0.0], [-0.5, 50.0, 0.0]], np.float32)
    integers, scales = quantised_weight(weight)
    assert integers.dtype == np.int8 and integers[:, :2].T.tolist() == [[127, -64], [85, 42]]
    assert np.abs((integers * scales - weight)[:, 0]).max() < 0.005, "the large column takes nothing from the small one"
    inputs = {"input_ids": np.array([[2, 7, 3, 0, 0]]), "attention_mask": np.array([[1, 1, 1, 0, 0]])}
    found = {name: array.tolist() for name, array in without_padding(inputs).items()}
    assert found == {"input_ids": [[2, 7, 3]], "attention_mask": [[1, 1, 1]]}
    seen = []
    monkeypatch.setattr(precision_module, "to_int8", lambda model, guarded, batches, *,
                        fused: seen.append(len(list(batches))) or model)  # fmt: skip
    assert not convert("bert", "int8", items=(made_up(model_of("bert").preprocessor) * 4)[:200]).notes
    assert seen == [50, 50]
    with pytest.raises(ExportError, match="int8 needs examples to calibrate on; fix: --parity-texts"):
        convert("bert", "int8", items=[])


def awkward_weights(rows: int, columns: int = 64) -> np.ndarray:
    """float32 (rows, columns): normal, all of one size, of one sign, with outliers, nothing."""
    weights = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    weights[:, 0], weights[:, 1], weights[:, 2], weights[:, 3] = 1, -3e-3, 0, np.abs(weights[:, 3])
    weights[0, 4:8] = 1000
    weights[: 2 * (rows // 2), 8] = np.tile([0.5039, 0.4961], rows // 2)  # both would be rounded up
    return weights


PRODUCT = GraphSignature((TensorSpec("x", "uint8", (BATCH, 512)),), (TensorSpec("y", "float32", (BATCH, 64)),))
GRAPH = """<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
    product (uint8[batch, 512] x) => (float[batch, 64] y)
    { y = com.microsoft.MatMulIntegerToFloat(x, w, x_scale, w_scale, x_zero, w_zero) }"""


def product(folder, weights: np.ndarray) -> None:
    model, zero = onnx.parser.parse_model(GRAPH), np.zeros((), np.int8)
    constants = {"w": weights, "x_scale": np.float32(1), "w_scale": np.ones(64, np.float32), "x_zero": np.uint8(0)}
    for name, value in {**constants, "w_zero": zero}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.save(model, folder / "model.onnx")


def test_no_processor_saturates_and_products_of_bytes_are_added_exactly(tmp_path):
    """x86 processors without VNNI keep sums of two products, of rows 2k and 2k + 1 with up to 255, in 16 bits."""
    for rows in (1, 2, 7, 512):
        integers, _ = quantised_weight(awkward_weights(rows))
        pairs = np.pad(integers.astype(np.int64), ((0, rows % 2), (0, 0))).reshape(-1, 2, 64)
        assert 255 * np.maximum(pairs, 0).sum(axis=1).max() <= np.iinfo(np.int16).max
        assert 255 * np.minimum(pairs, 0).sum(axis=1).min() >= np.iinfo(np.int16).min
        assert np.abs(integers[:, 3]).max() > 50 and (integers[:, :2] != 0).all(), "as little is given up as possible"
    product(tmp_path, integers)
    for rows in (1, 4, 33):  # there are kernels for one row, and for many
        x = np.full((rows, 512), 255, np.uint8)  # two of these products do not fit into 16 bits
        with OnnxRuntimeRunner(tmp_path / "model.onnx", PRODUCT, "the product") as runner:
            in_process = runner.run({"x": x})["y"]
        in_the_server = OnnxGraph(tmp_path, 0).run(["y"], {"x": x})[0]
        exact = x.astype(np.int64) @ integers.astype(np.int64)
        assert (in_process == exact).all() and (in_the_server == exact).all()


PROGRAM = """
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
np.save("y.npy", session.run(None, {"x": np.load("x.npy")})[0])
"""


@pytest.mark.debian
def test_a_processor_without_vnni_adds_exactly(tmp_path):
    """An emulated one with AVX2, whose kernel saturates where it may."""
    if (emulator := shutil.which("qemu-x86_64")) is None:
        pytest.skip("needs the Debian package qemu-user")
    x = np.concatenate([np.full((3, 512), 255), np.random.default_rng(0).integers(0, 256, (30, 512))]).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    limited, full = quantised_weight(awkward_weights(512))[0], np.full((512, 64), 127, np.int8)
    for weights, right in ((limited, True), (full, False)):
        product(tmp_path, weights)
        command = [emulator, "-cpu", "Haswell", sys.executable, "-c", PROGRAM]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
        exact = np.load(tmp_path / "y.npy") == x.astype(np.int64) @ weights.astype(np.int64)
        assert exact.all() == right, "the limited weights alone, or nothing was tested"
