"""Checkpoint -> verified ONNX graphs. Nothing is handed on that has not passed the parity gate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import nn

from rekd_deploy import onnx_model
from rekd_deploy.artefacts import Artefacts
from rekd_deploy.errors import ExportError
from rekd_deploy.examples import parity_examples
from rekd_deploy.graphs import CompactPredictorGraph, SelectorGraph
from rekd_deploy.manifest import build_manifest
from rekd_deploy.parity import check_parity
from rekd_deploy.signature import BATCH, LENGTH, GraphSignature, PairSignature, text_pair_signature
from rekd_train.checkpoint import checkpoint_hash, load
from rekd_train.models.rationalizer import Rationalizer

OPSET = 20
_EXAMPLE_BATCH = 2
"""Not 1: exporters take axes of size 0 or 1 for constants."""
_DTYPES = {"int64": torch.int64, "float32": torch.float32, "bool": torch.bool}


def export(
    checkpoint: str | Path,
    work: str | Path,
    *,
    parity_texts: str | Path | None = None,
    opset: int = OPSET,
    report: Callable[[str], None] = lambda step: None,
) -> Artefacts:
    """Export a text checkpoint as selector.onnx and predictor.onnx and prove both equal to the model.

    Args:
        checkpoint: directory written by rekd-train, its predictor compacted.
        work: directory that receives the two files.
        parity_texts: .jsonl or .txt with real texts for the gate; None: the checkpoint's own examples.
        opset: ONNX opset, 18 to 20.
        report: called with the name of each step as it starts.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ExportError: the model cannot be exported.
        ParityError: a graph does not compute what the model computes.
    """
    checkpoint, work = Path(checkpoint), Path(work)
    if opset not in onnx_model.OPSETS:
        raise ExportError(f"opset {opset} is not served; opsets: {', '.join(map(str, onnx_model.OPSETS))}")
    rationalizer = load(checkpoint)
    examples = parity_examples(checkpoint, rationalizer.preprocessor, parity_texts)
    paths = export_pair(rationalizer, work, opset=opset, report=report)
    report("parity")
    parity = check_parity(rationalizer, *paths, examples)
    manifest = build_manifest(rationalizer, checkpoint_hash(checkpoint), *paths, parity, opset)
    signature = pair_signature(rationalizer)
    return Artefacts(signature, *paths, rationalizer.preprocessor, tuple(rationalizer.labels), manifest)


def pair_signature(rationalizer: Rationalizer) -> PairSignature:
    """The tensors of a served pair."""
    return text_pair_signature(rationalizer.capacity, len(rationalizer.labels))


def export_pair(
    rationalizer: Rationalizer,
    work: Path,
    *,
    opset: int = OPSET,
    report: Callable[[str], None] = lambda step: None,
) -> tuple[Path, Path]:
    """selector.onnx and predictor.onnx of a model, not yet verified."""
    signature = pair_signature(rationalizer)
    modules = {"selector": SelectorGraph(rationalizer), "predictor": CompactPredictorGraph(rationalizer)}
    longest = min(module.backbone.settings.positions for module in (rationalizer.selector, rationalizer.predictor))
    if rationalizer.preprocessor.settings.max_length > longest:
        raise ExportError(
            f"max_length is {rationalizer.preprocessor.settings.max_length}, but the networks have {longest} position "
            "embeddings; fix: train with data.max_length at most that"
        )
    paths = []
    for role, module in modules.items():
        report(role)
        path = Path(work) / f"{role}.onnx"
        onnx_model.write(onnx_from_module(module, getattr(signature, role), role, longest, opset), path)
        paths.append(path)
    return paths[0], paths[1]


def onnx_from_module(
    module: nn.Module, signature: GraphSignature, name: str, longest: int, opset: int = OPSET
) -> onnx.ModelProto:
    """Trace a module into ONNX with the signature's names and symbolic axes.

    Args:
        module: takes the signature's inputs by position.
        longest: largest size of the axis 'length'.

    Raises:
        ExportError: tracing failed, or the graph is not what the signature says.
    """
    fixed = max((axis for spec in signature.inputs for axis in spec.shape if isinstance(axis, int)), default=0)
    # an example length that no other axis has: nothing may be taken for the length by coincidence
    sizes = {BATCH: _EXAMPLE_BATCH, LENGTH: min(longest, fixed + 13)}
    axes = {BATCH: torch.export.Dim(BATCH, min=1), LENGTH: torch.export.Dim(LENGTH, min=3, max=longest)}
    inputs = tuple(
        torch.ones([sizes.get(axis, axis) for axis in spec.shape], dtype=_DTYPES[spec.dtype])
        for spec in signature.inputs
    )
    dynamic = tuple(
        {index: axes[axis] for index, axis in enumerate(spec.shape) if axis in axes} for spec in signature.inputs
    )
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about the exporter's own insides; the result is checked instead
            program = torch.onnx.export(
                module.eval(),
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=dynamic,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever happened in its own and other classes
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"the {name} cannot be exported: {reason} (--debug shows the exporter's report)") from error
    model = onnx_model.cleaned(program.model_proto)
    onnx_model.check_interface(model, signature, name)
    onnx_model.check_constants(model, name)
    return model
