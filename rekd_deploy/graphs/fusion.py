"""Graphs for ONNX Runtime: attention, skip-layer-norm and GELU as its own single operators.

The exporter writes attention as MatMul, Softmax, MatMul; ONNX Runtime does not put it together again by
itself. Fused graphs run on ONNX Runtime alone (its operators' domain is com.microsoft). Which operators were
put together is counted from the finished file, and the parity gate runs on the fused graph.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx

from rekd_deploy.graphs.onnx_model import RUNTIME_DOMAIN

if TYPE_CHECKING:
    import onnx_ir


def fuse(model: onnx_ir.Model) -> onnx.ModelProto:
    """The fused graph of what torch.onnx.export made; ``model`` is changed.

    Args:
        model: ``program.model``, not a graph read from a file: the rules need the shapes in between.
    """
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    fused, _ = optimize_for_ort(model, clear_metadata=True)
    return onnx_ir.serde.serialize_model(fused)


def fused_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many of each of ONNX Runtime's own operators a graph holds; empty for a graph that was not fused."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node if node.domain == RUNTIME_DOMAIN).items()))


def unfused_attentions(model: onnx.ModelProto) -> list[str]:
    """Names of the Softmax outputs that still lead into a MatMul, at most through a test for NaN or a Cast."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for softmax in (node for node in model.graph.node if node.op_type == "Softmax"):
        pending = list(readers.get(softmax.output[0], []))
        while pending:
            node = pending.pop()
            if node.op_type == "MatMul":
                found.append(softmax.output[0])
                break
            if node.op_type in ("Where", "Cast", "IsNaN"):
                pending += [reader for name in node.output for reader in readers.get(name, [])]
    return found
