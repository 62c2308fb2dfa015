"""Checkpoint -> verified ONNX graphs. Nothing is handed on that has not passed the parity gate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.contract.parity_report import RUNTIME_PRECISIONS, ParityLimits, ParityReport, Precision, limits_of
from rekd_deploy.contract.signature import PairSignature
from rekd_deploy.errors import ExportError, ParityError, RepositoryError
from rekd_deploy.graphs import onnx_model
from rekd_deploy.graphs.guard import guarded
from rekd_deploy.graphs.modules import head_layers, pair_signature
from rekd_deploy.graphs.precision import Conversion, convert_pair, precision_entries
from rekd_deploy.graphs.tracing import OPSET, traced_graphs, write_graphs
from rekd_deploy.parity.examples import Examples, parity_examples, served_lengths, with_lengths
from rekd_deploy.parity.gate import check_parity
from rekd_deploy.parity.reference import record
from rekd_deploy.repository.manifest import build_manifest
from rekd_train.checkpoints.checkpoint import checkpoint_hash, load
from rekd_train.models.rationalizer import Rationalizer


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
        unattended: for a backend of Triton's, with nothing of ours before it; see ``rekd_deploy.graphs.guard``.
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
    """The graphs by role, each refusing rows that it cannot read; see ``rekd_deploy.graphs.guard``."""
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
        return _gate(rationalizer, graphs, examples, limits, **sessions)
    with TemporaryDirectory(dir=work) as folder:
        stand_in = write_graphs(conversion.emulated, Path(folder), pair_signature(rationalizer), "single" in graphs)
        parity = _parity(rationalizer, Conversion({}, conversion.precisions), stand_in, examples, work, **sessions)
    for report in parity.values():
        report.emulated = True
    return parity


def _gate(
    rationalizer: Rationalizer, graphs: dict[str, Path], examples: Examples, limits: ParityLimits, **sessions: Any
) -> dict[str, ParityReport]:
    pairs = {"pair": ("selector", "predictor"), **({"single": ("single",)} if "single" in graphs else {})}
    return {
        name: check_parity(rationalizer, {role: graphs[role] for role in roles}, examples, limits, **sessions)
        for name, roles in pairs.items()
    }


def prove_again(
    root: Path, manifest: dict[str, Any], paths: dict[str, Path], checkpoint: Path, sessions: dict[str, Any]
) -> dict[str, Any]:
    """The parity gate once more, on the graphs of a repository; its reports for JSON, by name.

    Raises:
        RepositoryError: another checkpoint, or the gate refuses.
    """
    digest = checkpoint_hash(checkpoint)
    if digest != manifest["checkpoint_sha256"]:
        raise RepositoryError(
            f"{root} was exported from the checkpoint {manifest['checkpoint_sha256'][:12]}, but {checkpoint} is "
            f"{digest[:12]}; fix: give the right checkpoint, or export this one"
        )
    rationalizer = load(checkpoint)
    rationalizer.preprocessor = with_lengths(rationalizer.preprocessor, tuple(manifest.get("lengths", ())))
    examples = parity_examples(checkpoint, rationalizer.preprocessor, class_names=rationalizer.labels)
    limits = ParityLimits(**manifest["parity"]["limits"])
    try:
        reports = _gate(rationalizer, paths, examples, limits, **sessions)
    except ParityError as error:
        raise RepositoryError(f"{root}: {error}; fix: rekd-export again") from None
    return {name: each.to_dict() for name, each in reports.items()}
