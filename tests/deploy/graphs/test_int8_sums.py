"""int8 products are added exactly by every processor and in every session: the integers, not nearly."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from precisions import conversion_of

from rekd_deploy.contract.signature import BATCH, GraphSignature, TensorSpec
from rekd_deploy.graphs.precision.int8 import quantised_weight
from rekd_deploy.repository.backend.graphs import OnnxGraph
from rekd_deploy.runtimes.base import Graph
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain


def sums_of_pairs(weights: np.ndarray) -> np.ndarray:
    """What x86 processors without VNNI keep in 16 bits, at its largest: 255 * weights (K, N) of rows 2k and 2k + 1."""
    pairs = np.pad(weights.astype(np.int64), ((0, len(weights) % 2), (0, 0))).reshape(-1, 2, weights.shape[1])
    return 255 * np.stack([np.maximum(pairs, 0).sum(axis=1), np.minimum(pairs, 0).sum(axis=1)])


def awkward_weights(rows: int, columns: int = 64) -> np.ndarray:
    """float32 (rows, columns): normal, all of one size, of one sign, with outliers, nothing."""
    generator = np.random.default_rng(rows)
    weights = generator.normal(size=(rows, columns)).astype(np.float32)
    weights[:, 0], weights[:, 1], weights[:, 2], weights[:, 3] = 1, -3e-3, 0, np.abs(weights[:, 3])
    weights[0, 4:8] = 1000
    weights[: 2 * (rows // 2), 8] = np.tile([0.5039, 0.4961], rows // 2)  # both would be rounded up
    return weights


@pytest.mark.parametrize("rows", [1, 2, 7, 512])
def test_no_processor_saturates(rows):
    integers, _ = quantised_weight(awkward_weights(rows))
    sums = sums_of_pairs(integers)
    assert sums.max() <= np.iinfo(np.int16).max and sums.min() >= np.iinfo(np.int16).min
    assert np.abs(integers[:, 3]).max() > 50 and (integers[:, :2] != 0).all(), "and as little is given up as possible"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_no_processor_saturates_on_what_is_exported(kind, fused):
    conversion = conversion_of(kind, "int8", fused)
    for role in (role for role, precision in conversion.precisions.items() if precision == "int8"):
        weights = [
            numpy_helper.to_array(tensor) for tensor in conversion.models[role].graph.initializer
            if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2
        ]  # fmt: skip
        assert len(weights) >= 6
        assert max(np.abs(sums_of_pairs(weight)).max() for weight in weights) < 2**15


def test_every_zero_point_is_there():
    """Left out (''), older releases of ONNX Runtime abort on some processors."""
    for model in conversion_of("bert", "int8").models.values():
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "MatMulIntegerToFloat":
                assert len(node.input) in (6, 7) and all(name in constants for name in node.input[1:])
                assert numpy_helper.to_array(constants[node.input[5]]) == 0
                assert constants[node.input[5]].data_type == constants[node.input[1]].data_type


SESSIONS = ["in process", "in the server", "on the device"]


def session_of(where: str, folder):
    """Opens model.onnx of ``folder`` as the pipeline does, or as the member of Triton's python backend does."""
    if where == "in the server":
        return OnnxGraph(folder, 1)
    if where == "on the device":
        runner = DeviceChain([Graph(folder / "model.onnx", PRODUCT, "the product")], device="cpu")
    else:
        runner = OnnxRuntimeRunner(folder / "model.onnx", PRODUCT, "the product")
    runner.__enter__()
    return runner


PRODUCT = GraphSignature((TensorSpec("x", "uint8", (BATCH, 512)),), (TensorSpec("y", "float32", (BATCH, 64)),))


def product(folder, weights: np.ndarray) -> None:
    """Writes model.onnx, which multiplies bytes by integers (512, N)."""
    columns = weights.shape[1]
    constants = {
        "w": weights, "x_scale": np.float32(1), "w_scale": np.ones(columns, np.float32), "x_zero": np.uint8(0),
        "w_zero": np.zeros((), np.int8),
    }  # fmt: skip
    node = helper.make_node(
        "MatMulIntegerToFloat", ["x", "w", "x_scale", "w_scale", "x_zero", "w_zero"], ["y"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", columns])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "model.onnx")


@pytest.mark.parametrize("where", SESSIONS)
@pytest.mark.parametrize("rows", [1, 4, 33])  # there are kernels for one row, and for many
def test_products_of_bytes_are_added_exactly(where, rows, tmp_path):
    weights, _ = quantised_weight(awkward_weights(512))
    product(tmp_path, weights)
    x = np.full((rows, 512), 255, np.uint8)  # two of these products do not fit into 16 bits
    session = session_of(where, tmp_path)
    found = session.run(["y"], {"x": x})[0] if where == "in the server" else session.run({"x": x})["y"]
    assert (found == x.astype(np.int64) @ weights.astype(np.int64)).all()


ASK = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for path in sys.argv[1:]:
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    np.save(path + ".npy", session.run(None, {"x": np.load(path + ".x.npy")})[0])
"""


@pytest.mark.debian
def test_a_processor_without_vnni_adds_exactly(tmp_path):
    """An emulated one with AVX2, whose kernel saturates where it may."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("needs the Debian package qemu-user")
    noise = np.random.default_rng(0).integers(0, 256, (30, 512), np.uint8)
    x = np.concatenate([np.full((3, 512), 255, np.uint8), noise])
    whole = np.full((512, 64), 127, np.int8)
    paths = {}
    for name, weights in {"limited": quantised_weight(awkward_weights(512))[0], "whole": whole}.items():
        (folder := tmp_path / name).mkdir()
        product(folder, weights)
        paths[str(folder / "model.onnx")] = x.astype(np.int64) @ weights.astype(np.int64)
        np.save(folder / "model.onnx.x.npy", x)
    command = [emulator, "-cpu", "Haswell", sys.executable, "-c", ASK, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    exact = [bool((np.load(path + ".npy") == wanted).all()) for path, wanted in paths.items()]
    assert exact == [True, False], "the limited weights alone, or nothing was tested"
