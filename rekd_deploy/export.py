"""Checkpoint -> verified ONNX graphs. Nothing is handed on that has not passed the parity gate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from torch import nn

from rekd_deploy import onnx_model
from rekd_deploy.artefacts import Artefacts
from rekd_deploy.errors import ExportError
from rekd_deploy.examples import Examples, parity_examples, served_lengths
from rekd_deploy.fusion import fuse
from rekd_deploy.fusion_cpu import norms_apart
from rekd_deploy.fusion_embedding import embeddings_together
from rekd_deploy.fusion_masks import masked_by_keys
from rekd_deploy.graphs import graph_modules, head_layers, pair_signature
from rekd_deploy.guard import guarded
from rekd_deploy.manifest import build_manifest
from rekd_deploy.onnx_lstm import onnx_lstms
from rekd_deploy.onnx_slots import cut_to_length, sizes_from_tensors
from rekd_deploy.parity import check_parity, check_single_parity
from rekd_deploy.parity_report import RUNTIME_PRECISIONS, ParityReport, Precision, limits_of
from rekd_deploy.precision.convert import Conversion, check_precision, convert_pair
from rekd_deploy.precision.observed import precision_entries
from rekd_deploy.reference import record
from rekd_deploy.signature import BATCH, LENGTH, SHORTEST, SLOTS, GraphSignature, PairSignature
from rekd_train.checkpoint import checkpoint_hash, load
from rekd_train.models.rationalizer import Rationalizer

OPSET = 20
_EXAMPLE_BATCH = 2
"""Not 1: exporters take axes of size 0 or 1 for constants."""
_EXAMPLE_SLOTS = 5
_DTYPES = {"int64": torch.int64, "float32": torch.float32, "bool": torch.bool, "uint8": torch.uint8}


def export(
    checkpoint: str | Path,
    work: str | Path,
    *,
    single_graph: bool = False,
    fused: bool = True,
    gpu: bool = False,
    precision: Precision = "fp32",
    for_engine: bool = False,
    unattended: bool = False,
    device: str = "cpu",
    threads: int = 0,
    lengths: tuple[int, ...] = (),
    parity_texts: str | Path | None = None,
    opset: int = OPSET,
    report: Callable[[str], None] = lambda step: None,
) -> Artefacts:
    """Export a checkpoint as selector.onnx and predictor.onnx and prove them equal to the model.

    Args:
        checkpoint: directory written by rekd-train; its predictor is exported with the operator it was trained with.
        work: directory that receives the files.
        single_graph: write single.onnx, too: both steps in one graph, proved by itself.
        fused: put attention and its neighbours together for ONNX Runtime; no other runtime reads the result.
        gpu: fuse what is faster on GPUs, and not what is faster on CPUs.
        precision: 'fp32', 'fp16', 'bf16' or 'int8'; the decision is made in float32 in any case.
        for_engine: the graphs are for an engine builder; ONNX Runtime need not be able to run them.
        unattended: for a backend of Triton's, with nothing of ours before it; see ``rekd_deploy.guard``.
        device: where the gate runs the graphs: 'cpu', 'cuda' or 'cuda:N'.
        threads: inside one operator where the graphs are served, and in the gate; 0: the target's own choice.
        lengths: tokens that texts are padded to when they are served, and in the gate; empty: the checkpoint's.
        parity_texts: .jsonl or .txt with real texts for the gate; None: the checkpoint's own examples.
        opset: ONNX opset, 18 to 20.
        report: called with the name of each step as it starts.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ExportError: the model cannot be exported, or not in that precision.
        ParityError, EngineError: a graph does not compute what the model computes, or nothing on that device.
    """
    checkpoint, work = Path(checkpoint), Path(work)
    if opset not in onnx_model.OPSETS:
        raise ExportError(f"opset {opset} is not served; opsets: {', '.join(map(str, onnx_model.OPSETS))}")
    check_precision(precision)
    if precision not in RUNTIME_PRECISIONS and not for_engine:
        raise ExportError(
            f"ONNX Runtime has no {precision} kernels to run the graphs with; fix: --precision "
            f"{', '.join(RUNTIME_PRECISIONS)}, or an engine"
        )
    rationalizer = load(checkpoint)
    rationalizer.preprocessor = served_lengths(rationalizer.preprocessor, rationalizer.policy, lengths)
    signature = pair_signature(rationalizer)
    examples = parity_examples(checkpoint, rationalizer.preprocessor, parity_texts, class_names=rationalizer.labels)
    models = traced_graphs(rationalizer, fused=fused, gpu=gpu, opset=opset, report=report)
    if precision != "fp32":
        report("precision")
    heads = head_layers(rationalizer)
    conversion = convert_pair(
        models, precision, signature, heads, rationalizer.preprocessor, examples.items, fused=fused,
        for_engine=for_engine,
    )
    models = guarded_pair(conversion.models, rationalizer, signature) if unattended else conversion.models
    if single_graph:
        report("single")
    graphs = write_graphs(models, work, signature, single_graph, fused)
    report("parity")
    sessions = {"target": "onnxruntime" if unattended and not for_engine else "python", "threads": threads or None}
    parity = _parity(rationalizer, conversion, graphs, examples, work, device=device, **sessions)
    manifest = build_manifest(
        rationalizer, checkpoint_hash(checkpoint), signature, graphs, parity, opset,
        precision_entries(graphs, precision, heads, conversion.notes),
    )
    return Artefacts(
        signature, graphs["selector"], graphs["predictor"], rationalizer.preprocessor, tuple(rationalizer.labels),
        manifest, graphs.get("single"), record(rationalizer, examples.items, work / "parity.npz"),
    )


def guarded_pair(
    models: dict[str, onnx.ModelProto], rationalizer: Rationalizer, signature: PairSignature
) -> dict[str, onnx.ModelProto]:
    preprocessor = rationalizer.preprocessor
    vocabulary = preprocessor.vocabulary_size if preprocessor.settings.kind == "text" else 0
    return {
        role: guarded(model, signature.graph(role), vocabulary, preprocessor.positions)
        for role, model in models.items()
    }


def _parity(
    rationalizer: Rationalizer, conversion: Conversion, graphs: dict[str, Path], examples: Examples, work: Path,
    **sessions: Any,
) -> dict[str, ParityReport]:
    """The gate's reports; a precision that ONNX Runtime lacks is emulated for it."""
    limits = limits_of(conversion.precisions["selector"], conversion.precisions["predictor"])
    if not conversion.emulated:
        selector, predictor = graphs["selector"], graphs["predictor"]
        parity = {"pair": check_parity(rationalizer, selector, predictor, examples, limits, **sessions)}
        if "single" in graphs:
            parity["single"] = check_single_parity(rationalizer, graphs["single"], examples, limits, **sessions)
        return parity
    with TemporaryDirectory(dir=work) as folder:
        stand_in = write_graphs(conversion.emulated, Path(folder), pair_signature(rationalizer), "single" in graphs)
        parity = _parity(rationalizer, Conversion({}, conversion.precisions), stand_in, examples, work, **sessions)
    for report in parity.values():
        report.emulated = True
    return parity


def export_graphs(
    rationalizer: Rationalizer,
    work: Path,
    *,
    single_graph: bool = False,
    fused: bool = True,
    gpu: bool = False,
    opset: int = OPSET,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, Path]:
    """The float32 ONNX files of a model by role, not yet verified; arguments and errors as ``export``."""
    models = traced_graphs(rationalizer, fused=fused, gpu=gpu, opset=opset, report=report)
    if single_graph:
        report("single")
    return write_graphs(models, work, pair_signature(rationalizer), single_graph, fused)


def traced_graphs(
    rationalizer: Rationalizer,
    *,
    fused: bool,
    gpu: bool = False,
    opset: int,
    report: Callable[[str], None] = lambda step: None,
) -> dict[str, onnx.ModelProto]:
    """The float32 graphs of a pair by role; arguments and errors as ``export``."""
    signature = pair_signature(rationalizer)
    longest = _longest(rationalizer)
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


def _longest(rationalizer: Rationalizer) -> int:
    """Largest size of the axis 'length'; of no meaning for images, whose axes are all fixed."""
    return min(module.backbone.settings.positions for module in (rationalizer.selector, rationalizer.predictor))


def onnx_from_module(
    module: nn.Module, signature: GraphSignature, name: str, longest: int, opset: int = OPSET, *, fused: bool = False
) -> onnx.ModelProto:
    """Trace a module into ONNX with the signature's names and symbolic axes.

    Args:
        module: its ``forward(*tensors)`` takes the signature's inputs in order.
        longest: largest size of the axes 'length' and 'slots'.
        fused: see ``rekd_deploy.fusion``.

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
            if fused:
                sizes_from_tensors(program.model)
            graph = fuse(program.model) if fused else program.model_proto
    except ModuleNotFoundError:  # the command says how to install it
        raise
    except Exception as error:  # the exporter wraps whatever happened in its own and other classes
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"the {name} cannot be exported: {reason} (--debug shows the exporter's report)") from error
    model = onnx_model.cleaned(graph)
    onnx_model.check_interface(model, signature, name)
    return model
