"""The manifest: what an export is, so that its files can be checked against it later; and its numbered versions.

No times, no paths. Component models may stand in several version folders beside each other; what clients call (the
ensemble, the single graph) has exactly the newest, and the ensemble's steps name the versions they run, so that no
answer mixes two exports. torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.signature import GraphSignature, PairSignature, Slots, TensorSpec
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import CONFIG_FILE, PREDICTOR, SELECTOR, THREADS, read_config
from rekd_train import __version__
from rekd_train.files import sha256

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from rekd_deploy.contract.parity_report import ParityReport
    from rekd_train.models.rationalizer import Rationalizer

FORMAT = "rekd-export"
VERSION = 1
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy")
COMPONENTS = (SELECTOR, PREDICTOR)
"""The models that keep earlier versions."""
_MAY_DIFFER = ("version_policy", "dynamic_batching", "instance_group", "model_warmup")
"""Fields that a new export may change under the versions that stay; batches, too, unless engines are built for them."""


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
        precision: of each graph, requested and observed: ``rekd_deploy.graphs.precision.precision_entries``.
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
    """Check files against the manifest.

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


@dataclass(frozen=True)
class Versions:
    """The version folders of a repository."""

    current: int = 1
    """The newest, which serves requests."""
    earlier: tuple[int, ...] = ()
    """Older versions of the component models that stay beside it, ascending."""

    @property
    def components(self) -> tuple[int, ...]:
        """All versions of a component model, ascending."""
        return (*self.earlier, self.current)

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Versions:
        """As a repository's manifest records them; of an export without a repository: the first."""
        described = manifest.get("repository", {})
        return cls(int(described.get("model_version", 1)), tuple(map(int, described.get("earlier", {}))))

    def after(self, keep: int) -> Versions:
        """What they are once a new version has come and ``keep`` of all stay."""
        first = max(len(self.components) + 1 - keep, 0)
        return Versions(self.current + 1, self.components[first:])


def newest_folder(root: Path) -> int:
    """The highest version number in any component model's folder; 0 where there is none."""
    folders = (folder.name for name in COMPONENTS for folder in Path(root).glob(f"{name}/*") if folder.is_dir())
    return max((int(name) for name in folders if name.isdecimal()), default=0)


def pin_versions(configs: Mapping[str, ModelConfig], versions: Versions) -> None:
    """Write the versions into the configurations: which each model serves, and which the ensemble's steps run."""
    for name, config in configs.items():
        served = versions.components if name in COMPONENTS else (versions.current,)
        config.version_policy.specific.versions[:] = served
        for step in config.ensemble_scheduling.step:
            step.model_version = versions.current


def check_side_by_side(root: Path, configs: Mapping[str, ModelConfig]) -> None:
    """Raise RepositoryError where the versions in ``root`` cannot be served under the new configurations.

    A model's versions share one config.pbtxt, so they must agree in tensors, backend and limits.
    """
    for name in COMPONENTS:
        differing = differing_fields(read_config(Path(root) / name / CONFIG_FILE), configs[name])
        if differing:
            raise RepositoryError(
                f"{root}: the earlier versions of {name} cannot stay beside the new one: {', '.join(differing)} "
                "differ, and all versions of a model share them; fix: --keep 1, or another --output"
            )


def differing_fields(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Names of the fields in which two versions of one model differ and must not, sorted; empty: they fit."""
    old, new = _comparable(old), _comparable(new)
    return sorted(field.name for field in new.DESCRIPTOR.fields if getattr(new, field.name) != getattr(old, field.name))


def _comparable(config: ModelConfig) -> ModelConfig:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    bare = ModelConfig()
    bare.CopyFrom(config)
    for field in _MAY_DIFFER:
        bare.ClearField(field)
    bare.parameters.pop(THREADS, None)  # the cores of the machine that exported
    if bare.backend != "tensorrt":
        bare.ClearField("max_batch_size")
    return bare
