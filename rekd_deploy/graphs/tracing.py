"""Networks -> float32 ONNX graphs, not yet verified."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from rekd_deploy.contract.signature import BATCH, LENGTH, MILLION, SHORTEST, SLOTS, GraphSignature, PairSignature
from rekd_deploy.errors import ExportError
from rekd_deploy.graphs import onnx_model
from rekd_deploy.graphs.fusion import embeddings_together, fuse, masked_by_keys, norms_apart
from rekd_deploy.graphs.modules import graph_modules, onnx_lstms, pair_signature
from rekd_train.models.rationalizer import Rationalizer

OPSET = 20
_EXAMPLE_BATCH = 2
"""Not 1: exporters take axes of size 0 or 1 for constants."""
_EXAMPLE_SLOTS = 5
_CUT = "slots/"
"""What the names of the tensors begin with that ``cut_to_length`` adds."""
_DTYPES = {"int64": torch.int64, "float32": torch.float32, "bool": torch.bool, "uint8": torch.uint8}


def traced_graphs(
    rationalizer: Rationalizer,
    *,
    fused: bool = True,
    gpu: bool = False,
    opset: int = OPSET,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, onnx.ModelProto]:
    """The float32 graphs of a pair by role; arguments and errors as ``export``."""
    signature = pair_signature(rationalizer)
    # the largest size of the axis 'length'; of no meaning for images, whose axes are all fixed
    longest = min(module.backbone.settings.positions for module in (rationalizer.selector, rationalizer.predictor))
    models = {}
    for role, module in graph_modules(rationalizer).items():
        report(role)
        models[role] = onnx_from_module(module, module.signature, role, longest, opset, fused=fused)
        if role == "selector" and signature.selector.slots is not None:
            models[role] = cut_to_length(models[role], signature.selector)
        if fused and not gpu:
            models[role] = masked_by_keys(norms_apart(models[role]))
    return models


def write_graphs(
    models: dict[str, onnx.ModelProto], work: Path, signature: PairSignature, single_graph: bool, fused: bool = False
) -> dict[str, Path]:
    """The checked files of a pair's graphs, and of both joined."""
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
        ExportError: tracing failed, or the graph is not what the signature says.
    """
    fixed = max((axis for spec in signature.inputs for axis in spec.shape if isinstance(axis, int)), default=0)
    # example sizes that no other axis has: nothing may be taken for another by coincidence
    sizes = {BATCH: _EXAMPLE_BATCH, LENGTH: min(longest, fixed + 13), SLOTS: _EXAMPLE_SLOTS}
    axes = {
        BATCH: torch.export.Dim(BATCH, min=1), LENGTH: torch.export.Dim(LENGTH, min=SHORTEST, max=longest),
        SLOTS: torch.export.Dim(SLOTS, min=1, max=longest),
    }
    inputs = tuple(
        torch.ones([sizes.get(axis, axis) for axis in spec.shape], dtype=_DTYPES[spec.dtype])
        for spec in signature.inputs
    )
    dynamic = tuple(
        {index: axes[axis] for index, axis in enumerate(spec.shape) if axis in axes} for spec in signature.inputs
    )
    try:
        with warnings.catch_warnings(), torch.no_grad(), onnx_lstms(module):
            warnings.simplefilter("ignore")  # about the exporter's own insides; the result is checked instead
            program = torch.onnx.export(
                module.eval(),
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=(dynamic,),  # one entry for all of *tensors
                external_data=False,
                verbose=False,
            )
            graph = fuse(program.model) if fused else program.model_proto
    except ModuleNotFoundError:  # the command says how to install it
        raise
    except Exception as error:  # the exporter wraps whatever happened in its own and other classes
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"the {name} cannot be exported: {reason} (--debug shows the exporter's report)") from error
    model = onnx_model.cleaned(graph)
    onnx_model.check_interface(model, signature, name)
    return model


def cut_to_length(model: onnx.ModelProto, signature: GraphSignature) -> onnx.ModelProto:
    """A copy of a selector's graph whose outputs with the axis 'slots' are as long as ``Slots.at`` says.

    The selector is traced with the slots of the longest text; short texts hand few of them to the predictor. The number
    is computed from the shape of an input, so it is a constant wherever shapes are.

    Args:
        signature: the selector's, with a rule of slots.
    """
    rule, names = signature.slots, [spec.name for spec in signature.outputs if SLOTS in spec.shape]
    changed = deepcopy(model)
    for node in changed.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [f"{_CUT}all_{name}" if name in names else name for name in tensors]
    constants = {
        "share": [rule.parts_per_million], "million": [MILLION], "least": [rule.least], "most": [rule.most],
        "start": [0], "axis": [1],
    }
    changed.graph.initializer.extend(
        numpy_helper.from_array(np.array(values, np.int64), _CUT + name) for name, values in constants.items()
    )
    # integers throughout: ONNX divides them towards 0, which is down here
    changed.graph.node.extend([
        _node("Shape", [signature.inputs[0].name], "length", start=1, end=2),
        _node("Mul", [f"{_CUT}length", f"{_CUT}share"], "parts"),
        _node("Div", [f"{_CUT}parts", f"{_CUT}million"], "whole"),
        _node("Max", [f"{_CUT}whole", f"{_CUT}least"], "wanted"),
        _node("Min", [f"{_CUT}wanted", f"{_CUT}most"], "count"),
        *(
            helper.make_node(
                "Slice", [f"{_CUT}all_{name}", f"{_CUT}start", f"{_CUT}count", f"{_CUT}axis"], [name],
                name=f"{_CUT}{name}",
            )
            for name in names
        ),
    ])
    for value in changed.graph.output:
        if value.name in names:
            value.type.tensor_type.shape.dim[1].dim_param = SLOTS
    return changed


def _node(operator: str, inputs: list[str], result: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [_CUT + result], name=_CUT + result, **attributes)
