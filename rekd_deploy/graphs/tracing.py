"""Networks -> float32 ONNX graphs, not yet verified."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from rekd_deploy.contract.signature import BATCH, LENGTH, MILLION, SHORTEST, SLOTS, GraphSignature, PairSignature
from rekd_deploy.errors import ExportError
from rekd_deploy.graphs import onnx_model
from rekd_deploy.graphs.fusion import embeddings_together, fuse, masked_by_keys, norms_apart
from rekd_deploy.graphs.modules import graph_modules, onnx_lstms, pair_signature
from rekd_deploy.graphs.onnx_model import make_node
from rekd_train.models.rationalizer import Rationalizer

OPSET = 20


def traced_graphs(
    rationalizer: Rationalizer, *, fused: bool = True, gpu: bool = False, opset: int = OPSET,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, onnx.ModelProto]:
    """The float32 graphs of a pair by role; arguments and errors as ``export``."""
    # the largest size of the axis 'length'; of no meaning for images, whose axes are all fixed
    longest = min(module.backbone.settings.positions for module in (rationalizer.selector, rationalizer.predictor))
    models = {}
    for role, module in graph_modules(rationalizer).items():
        report(role)
        models[role] = onnx_from_module(module, module.signature, role, longest, opset, fused=fused)
    selector = pair_signature(rationalizer).selector
    if selector.slots is not None:
        models["selector"] = cut_to_length(models["selector"], selector)
    if fused and not gpu:
        models = {role: masked_by_keys(norms_apart(model)) for role, model in models.items()}
    return models


def write_graphs(
    models: dict[str, onnx.ModelProto], work: Path, signature: PairSignature, single_graph: bool, fused: bool = False
) -> dict[str, Path]:
    """The checked files of a pair's graphs, and of both joined.

    Raises:
        ExportError: a graph is not what the signature says, or holds a value that is not finite.
    """
    if fused:
        models = {role: embeddings_together(model) for role, model in models.items()}
    if single_graph:
        models = {**models, "single": onnx_model.joined(models["selector"], models["predictor"], signature)}
    paths = {role: Path(work) / f"{role}.onnx" for role in models}
    for role, model in models.items():
        onnx_model.check_interface(model, signature.graph(role), role)
        onnx_model.check_constants(model, role)
        onnx_model.write(model, paths[role])
    return paths


def onnx_from_module(
    module: nn.Module, signature: GraphSignature, name: str, longest: int, opset: int = OPSET, *, fused: bool = False
) -> onnx.ModelProto:
    """Trace a module into ONNX with the signature's names and symbolic axes.

    Args:
        module: its ``forward(*tensors)`` takes the signature's inputs in order.
        longest: largest size of the axes 'length' and 'slots'.
        fused: see ``rekd_deploy.graphs.fusion``.

    Raises:
        ExportError: tracing failed, or the servers do not read the graph.
    """
    fixed = max((axis for spec in signature.inputs for axis in spec.shape if isinstance(axis, int)), default=0)
    # sizes that no other axis has, lest one be taken for another; exporters take axes of 0 or 1 for constants
    sizes = {BATCH: 2, LENGTH: min(longest, fixed + 13), SLOTS: 5}
    least = {BATCH: {"min": 1}, LENGTH: {"min": SHORTEST, "max": longest}, SLOTS: {"min": 1, "max": longest}}
    axes = {name: torch.export.Dim(name, **limits) for name, limits in least.items()}
    inputs = tuple(
        torch.ones([sizes.get(axis, axis) for axis in spec.shape], dtype=getattr(torch, spec.dtype))
        for spec in signature.inputs
    )
    dynamic = tuple(
        {index: axes[axis] for index, axis in enumerate(spec.shape) if axis in axes} for spec in signature.inputs
    )
    try:
        with warnings.catch_warnings(), torch.no_grad(), onnx_lstms(module):
            warnings.simplefilter("ignore")  # about the exporter's own insides; the result is checked instead
            program = torch.onnx.export(
                module.eval(), inputs, dynamo=True, opset_version=opset, external_data=False, verbose=False,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=(dynamic,),  # one entry for all of *tensors
            )
            graph = fuse(program.model) if fused else program.model_proto
    except ModuleNotFoundError:  # the command says how to install it
        raise
    except Exception as error:  # the exporter wraps whatever happened in its own and other classes
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"the {name} cannot be exported: {reason} (--debug shows the exporter's report)") from error
    return onnx_model.cleaned(graph)


def cut_to_length(model: onnx.ModelProto, signature: GraphSignature) -> onnx.ModelProto:
    """A copy of a selector's graph whose outputs with the axis 'slots' are as long as ``signature.slots`` says.

    The selector is traced with the slots of the longest text; short texts hand few of them to the predictor. The number
    is computed from the shape of an input, so it is a constant wherever shapes are.
    """
    rule, cut = signature.slots, {spec.name for spec in signature.outputs if SLOTS in spec.shape}
    changed = deepcopy(model)
    for node in changed.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [f"slots/all_{name}" if name in cut else name for name in tensors]
    constants = {
        "share": [rule.parts_per_million], "million": [MILLION], "least": [rule.least], "most": [rule.most],
        "start": [0], "axis": [1],
    }
    changed.graph.initializer.extend(
        numpy_helper.from_array(np.array(values, np.int64), f"slots/{name}") for name, values in constants.items()
    )
    nodes = [make_node("Shape", [signature.inputs[0].name], "slots/length", start=1, end=2)]
    # integers throughout: ONNX divides them towards 0, which is down here
    for operator, left, right, result in (
        ("Mul", "length", "share", "parts"), ("Div", "parts", "million", "whole"),
        ("Max", "whole", "least", "wanted"), ("Min", "wanted", "most", "count"),
    ):
        nodes.append(make_node(operator, [f"slots/{left}", f"slots/{right}"], f"slots/{result}"))
    for value in changed.graph.output:
        if value.name in cut:
            inputs = [f"slots/all_{value.name}", "slots/start", "slots/count", "slots/axis"]
            nodes.append(make_node("Slice", inputs, value.name, f"slots/{value.name}"))
            value.type.tensor_type.shape.dim[1].dim_param = SLOTS
    changed.graph.node.extend(nodes)
    return changed
