"""The manifest: what an export is, so that its files can be held against it later. No times, no paths. torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.signature import GraphSignature, PairSignature, Slots, TensorSpec
from rekd_deploy.errors import RepositoryError
from rekd_train import __version__
from rekd_train.files import sha256

if TYPE_CHECKING:
    from rekd_deploy.contract.parity_report import ParityReport
    from rekd_train.models.rationalizer import Rationalizer

FORMAT = "rekd-export"
VERSION = 1
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy")


def build_manifest(
    rationalizer: Rationalizer,
    checkpoint_sha256: str,
    signature: PairSignature,
    graphs: Mapping[str, Path],
    parity: Mapping[str, ParityReport],
    opset: int,
    precision: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The manifest of verified graphs, ready for JSON.

    Args:
        checkpoint_sha256: ``rekd_train.checkpoints.checkpoint.checkpoint_hash`` of what was exported.
        signature: the pair's tensors.
        graphs: the ONNX files by role: 'selector', 'predictor', perhaps 'single'.
        parity: the gate's reports: 'pair', perhaps 'single'.
        precision: of each graph, asked and observed: ``rekd_deploy.graphs.precision.convert.precision_entries``.
    """
    preprocessor = rationalizer.preprocessor
    settings = preprocessor.settings
    lengths = {"lengths": list(settings.buckets), "max_length": settings.max_length} if settings.kind == "text" else {}
    if slots := signature.predictor.slots:
        lengths["slots"] = [slots.at(length) for length in settings.buckets]
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": {"rekd": __version__, **library_versions()},
        "checkpoint_sha256": checkpoint_sha256,
        "artefacts": {
            role: {
                "format": "onnx",
                "opset": opset,
                **precision[role],
                "fused": fused_operators(path),
                **file_entry(path),
            }
            for role, path in graphs.items()
        },
        "signature": signature_to_dict(signature),
        "operator": rationalizer.predictor.operator,
        "capacity": rationalizer.capacity,
        **lengths,
        "preprocessing": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items()},
        "policy": rationalizer.policy.model_dump(),
        "labels": list(rationalizer.labels),
        "probability_temperature": rationalizer.probability_temperature,
        "preprocessing_sha256": preprocessor.fingerprint,
        "parity": parity["pair"].to_dict(),
        **({"single_parity": parity["single"].to_dict()} if "single" in parity else {}),
    }


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that shape an export."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def fused_operators(path: Path) -> dict[str, int]:
    """ONNX Runtime's own operators in a graph, counted."""
    import onnx

    from rekd_deploy.graphs import fusion

    return fusion.fused_operators(onnx.load(path, load_external_data=False))


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def verify_files(manifest: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Hold files against the manifest.

    Args:
        files: path of each artefact by its name in the manifest ('selector', 'predictor', 'single').

    Raises:
        RepositoryError: names every file that is missing, altered, or unknown to the manifest.
    """
    entries = manifest.get("artefacts", {})
    complaints = [f"the manifest has no artefact '{role}'" for role in files if role not in entries]
    for role in (role for role in files if role in entries):
        path, entry = files[role], entries[role]
        if not path.is_file():
            complaints.append(f"{path} is missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            complaints.append(f"{path} has {size} bytes, the manifest says {entry['bytes']}")
        elif (digest := sha256(path)) != entry["sha256"]:
            owner = next((name for name, other in entries.items() if other["sha256"] == digest), None)
            swapped = f"; it is the {owner}" if owner else ""
            complaints.append(
                f"{path} was altered: its SHA-256 begins with {digest[:12]}, the manifest says "
                f"{entry['sha256'][:12]}{swapped}"
            )
    if complaints:
        raise RepositoryError("; ".join(complaints) + "; fix: write the repository again with rekd-export")


def signature_to_dict(signature: PairSignature) -> dict[str, Any]:
    """As JSON: {"selector": {"inputs": [{"name", "dtype", "shape"}, ...], "outputs": [...]}, "predictor": ...}."""
    return {role: _graph_to_dict(getattr(signature, role)) for role in ("selector", "predictor")}


def signature_from_dict(content: Mapping[str, Any]) -> PairSignature:
    """The inverse of ``signature_to_dict``.

    Raises:
        RepositoryError: the content is not a signature.
    """
    try:
        return PairSignature(*(_graph_from_dict(content[role]) for role in ("selector", "predictor")))
    except (KeyError, TypeError) as error:
        raise RepositoryError(f"the manifest's signature cannot be read ({error!r}); fix: export again") from None


def _graph_to_dict(graph: GraphSignature) -> dict[str, Any]:
    tensors = {
        kind: [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in specs]
        for kind, specs in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }
    return tensors if graph.slots is None else {**tensors, "slots": asdict(graph.slots)}


def _graph_from_dict(content: Mapping[str, Any]) -> GraphSignature:
    return GraphSignature(
        *(
            tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in content[kind])
            for kind in ("inputs", "outputs")
        ),
        slots=Slots(**content["slots"]) if "slots" in content else None,
    )
