"""The manifest: what an export is, so that its files can be checked against it later; and its numbered versions.

No times, no paths. Component models may stand in several version folders beside each other; what clients call (the
ensemble, the single graph) has exactly the newest, and the ensemble's steps name the versions they run, so that no
answer mixes two exports. torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from rekd_deploy.contract.description import BUDGET, FAMILIARITY
from rekd_deploy.contract.description import VERSION as REKD_VERSION
from rekd_deploy.contract.signature import PairSignature
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import COMPONENTS, SHORTEST_LENGTH, THREADS, parameters_of
from rekd_train import __version__
from rekd_train.files import sha256

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    from rekd_deploy.contract.parity_report import ParityReport
    from rekd_train.models.rationalizer import Rationalizer

FORMAT, VERSION = "rekd-export", 1
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy")
"""Those that shape an export."""
_MAY_DIFFER = ("version_policy", "dynamic_batching", "instance_group", "model_warmup")
"""Fields that a new export may change under the versions that stay; batches, too, unless engines are built for them."""
_OWN_PARAMETERS = (THREADS, SHORTEST_LENGTH, FAMILIARITY, BUDGET, REKD_VERSION)
"""Of the machine and the program that exported, the texts that were learnt from, the rule: each version's own."""
_SIGNATURE = TypeAdapter(PairSignature)


def build_manifest(
    rationalizer: Rationalizer, checkpoint_sha256: str, signature: PairSignature, graphs: Mapping[str, Path],
    parity: Mapping[str, ParityReport], opset: int, precision: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The manifest of verified graphs, ready for JSON.

    Args:
        graphs: the ONNX files by role: 'selector', 'predictor', perhaps 'single'.
        parity: the gate's reports: 'pair', perhaps 'single'.
        precision: of each graph: ``rekd_deploy.graphs.precision.precision_entries``.
    """
    import onnx

    from rekd_deploy.graphs.fusion import fused_operators

    preprocessor = rationalizer.preprocessor
    settings = preprocessor.settings
    lengths = {"lengths": list(settings.buckets), "max_length": settings.max_length} if settings.kind == "text" else {}
    if slots := signature.predictor.slots:
        lengths["slots"] = [slots.at(length) for length in settings.buckets]
    versions = {"rekd": __version__}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "format": FORMAT, "version": VERSION, "versions": versions, "checkpoint_sha256": checkpoint_sha256,
        "artefacts": {
            role: {
                "format": "onnx", "opset": opset, **precision[role],
                "fused": fused_operators(onnx.load(path, load_external_data=False)),
                "bytes": path.stat().st_size, "sha256": sha256(path),
            }
            for role, path in graphs.items()
        },
        "signature": signature_to_dict(signature),
        "operator": rationalizer.predictor.operator, "capacity": rationalizer.capacity, **lengths,
        "preprocessing": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items()},
        "policy": rationalizer.policy.model_dump(), "labels": list(rationalizer.labels),
        "probability_temperature": rationalizer.probability_temperature,
        "preprocessing_sha256": preprocessor.fingerprint,
        "parity": parity["pair"].to_dict(),
        **({"single_parity": parity["single"].to_dict()} if "single" in parity else {}),
    }


def verify_files(manifest: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Raise RepositoryError naming every file, by its role in the manifest, that is missing or not what it says."""
    digests = {role: entry["sha256"] for role, entry in manifest["artefacts"].items()}
    if wrong := [str(p) for role, p in files.items() if not p.is_file() or sha256(p) != digests[role]]:
        raise RepositoryError(
            f"{', '.join(wrong)} was altered or is missing (its SHA-256 is not the manifest's); fix: write the "
            "repository again with rekd-export"
        )


def signature_to_dict(signature: PairSignature) -> dict[str, Any]:
    """As JSON: {"selector": {"inputs": [{"name", "dtype", "shape"}, ...], "outputs": [...]}, "predictor": ...}."""
    return _SIGNATURE.dump_python(signature, mode="json", exclude_none=True)


def signature_from_dict(content: Mapping[str, Any]) -> PairSignature:
    """The inverse of ``signature_to_dict``; RepositoryError: the content is not a signature."""
    try:
        return _SIGNATURE.validate_python(content)
    except ValidationError as error:
        reason = " ".join(str(error).split())
        raise RepositoryError(f"the manifest's signature cannot be read ({reason}); fix: export again") from None


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


def differing_fields(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Names of the fields in which two versions of one model differ and must not, sorted; empty: they fit."""
    ignored = {*_MAY_DIFFER, *(() if new.backend == "tensorrt" else ("max_batch_size",))}

    def values(config: ModelConfig) -> dict[str, Any]:
        fields = {field.name: getattr(config, field.name) for field in config.DESCRIPTOR.fields}
        parameters = parameters_of(config)
        for own in _OWN_PARAMETERS:
            parameters.pop(own, None)
        return {**fields, "parameters": parameters}

    before, after = values(old), values(new)
    return sorted(name for name in after if name not in ignored and after[name] != before[name])
