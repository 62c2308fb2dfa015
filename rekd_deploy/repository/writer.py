"""A model repository for Triton: written whole or not at all, checked before it is served.

    manifest.json     what was exported, and the SHA-256 of every file below
    parity.npz        a few inputs and the PyTorch model's answers, to verify the graphs by
    rekd_selector/    config.pbtxt, warmup/, 1/model.onnx and what runs it; with engines, 1/model.plan, too
    rekd_predictor/   likewise; rekd_single/ likewise, both steps in one graph, if it was exported
    rekd/             the ensemble: config.pbtxt, labels.txt and an empty version folder (Triton requires it)
    rekd_text/        or rekd_image/: texts or image files in, rationales out, if it was exported

A later export to the same place is version 2, and so on (see rekd_deploy.repository.manifest).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rekd_deploy.contract.description import Artefacts
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository import config
from rekd_deploy.repository.build import build_configs, model_files
from rekd_deploy.repository.config import CONFIG_FILE, GRAPH_MODELS, MANIFEST, PLAN, ServingSettings
from rekd_deploy.repository.manifest import Versions, differing_fields, newest_folder, pin_versions
from rekd_deploy.repository.reader import FORMAT, FORMAT_VERSION, check_repository, refuse_foreign_folder
from rekd_deploy.repository.text_endpoint import BACKEND, COMPONENT_CODE, endpoint_config, place_endpoint, place_graph
from rekd_deploy.repository.workspaces import one_at_a_time, replacing
from rekd_train.files import sha256, write_bytes, write_json, write_text

_CODE = {"model.py": BACKEND / "model.py", **COMPONENT_CODE}
_ENGINE_CODE = Path(__file__).parents[1] / "runtimes" / "tensorrt_execution.py"
_CACHES = shutil.ignore_patterns("__pycache__")
"""A server that may write leaves them beside its models."""
_EARLIER_KEYS = ("versions", "checkpoint_sha256", "artefacts", "preprocessing_sha256")
"""What the manifest keeps of the versions before."""


def write_repository(
    artefacts: Artefacts, root: Path, *, target: str = "python", keep: int = 1, text_endpoint: bool = False,
    **serving: Any,
) -> Path:
    """Place verified graphs in a repository that Triton serves.

    Until the new repository is whole, the old one is; the same export once more changes nothing.

    Args:
        root: the repository; an older one there becomes the version before, anything else is refused.
        target: which backend runs the graphs.
        keep: versions that stay, the new one included.
        text_endpoint: add the model that takes texts or image files as bytes.
        serving: fields of ``ServingSettings``.

    Raises:
        RepositoryError: the folder holds something else, or earlier versions that should stay are damaged or do not
            fit beside the new one.
        ConfigError: a number is out of range.
    """
    settings = ServingSettings(**serving)
    root = Path(root)
    configs = build_configs(artefacts, settings, target)
    if text_endpoint:
        endpoint = endpoint_config(artefacts, settings, target)
        configs[endpoint.name] = endpoint
    with one_at_a_time(root):  # versions are counted and replaced by one export after the other
        refuse_foreign_folder(root)
        if not _is_unchanged(root, artefacts, configs, keep):
            _write(artefacts, root, configs, target, keep, settings)
    return root


def _write(
    artefacts: Artefacts, root: Path, configs: Mapping[str, Any], target: str, keep: int, settings: ServingSettings
) -> None:
    versions, earlier = next_versions(root, configs, keep)
    pin_versions(configs, versions)
    with replacing(root) as work:
        _lay_out(artefacts, work, configs, str(versions.current))
        for kept in (f"{name}/{version}" for name in config.COMPONENTS for version in versions.earlier):
            shutil.copytree(root / kept, work / kept, copy_function=_link_or_copy, ignore=_CACHES)
        described = {
            "format": FORMAT, "version": FORMAT_VERSION, "target": target, "model_version": versions.current,
            "batches": sorted({*settings.preferred, settings.max_batch_size}), "earlier": earlier,
            "files": _digests(work),
        }
        write_json(work / MANIFEST, {**artefacts.manifest, "repository": described})


def _lay_out(artefacts: Artefacts, work: Path, configs: Mapping[str, Any], version: str) -> None:
    """Write everything but the manifest and earlier versions."""
    for name, configuration in configs.items():
        (work / name / version).mkdir(parents=True)
        write_text(work / name / CONFIG_FILE, config.config_text(configuration))
    for name, content in model_files(configs, artefacts).items():
        (work / name).parent.mkdir(exist_ok=True)
        write_bytes(work / name, content)
    for role, graph in artefacts.graphs.items():
        python = configs[GRAPH_MODELS[role]].backend == "python"
        beside = dict(_CODE) if python else {}
        if role in artefacts.engines:
            beside |= {PLAN: artefacts.engines[role], **({"tensorrt_execution.py": _ENGINE_CODE} if python else {})}
        place_graph(graph, work / GRAPH_MODELS[role] / version)
        for name, source in beside.items():
            shutil.copyfile(source, work / GRAPH_MODELS[role] / version / name)
    (work / config.ENSEMBLE / version / ".gitkeep").touch()
    if config.ENDPOINTS[artefacts.preprocessor.settings.kind] in configs:
        place_endpoint(artefacts, work, configs, version)
    if artefacts.reference is not None:
        shutil.copyfile(artefacts.reference, work / config.REFERENCE)


def _is_unchanged(root: Path, artefacts: Artefacts, configs: Mapping[str, Any], keep: int) -> bool:
    """Whether this very export lies at ``root`` already, whole. It pins the configs to the versions there."""
    try:
        manifest = check_repository(root)
    except RepositoryError:
        return False
    versions, files = Versions.of(manifest), manifest.pop("repository")["files"]
    if len(versions.components) > keep or manifest != json.loads(json.dumps(artefacts.manifest)):
        return False
    pin_versions(configs, versions)
    with TemporaryDirectory() as folder:
        _lay_out(artefacts, Path(folder), configs, str(versions.current))
        written = _digests(Path(folder))
    earlier = tuple(f"{name}/{number}/" for name in config.COMPONENTS for number in versions.earlier)
    return written == {name: digest for name, digest in files.items() if not name.startswith(earlier)}


def next_versions(root: Path, configs: Mapping[str, Any], keep: int) -> tuple[Versions, dict[str, Any]]:
    """The versions of the new repository, and what the manifest says about the earlier ones.

    Raises:
        RepositoryError: an earlier version should stay, but is damaged or does not fit beside the new one.
    """
    newest = newest_folder(root)
    if keep == 1 or not newest:
        return Versions(newest + 1), {}
    manifest = check_repository(root)  # what stays must be whole
    for name in config.COMPONENTS:
        if differing := differing_fields(config.read_config(Path(root) / name / CONFIG_FILE), configs[name]):
            raise RepositoryError(
                f"{root}: the earlier versions of {name} cannot stay beside the new one: {', '.join(differing)} "
                "differ, and all versions of a model share them; fix: --keep 1, or another --output"
            )
    versions = Versions.of(manifest).after(keep)
    known = manifest["repository"].get("earlier", {})
    known[str(versions.current - 1)] = {key: manifest[key] for key in _EARLIER_KEYS if key in manifest}
    return versions, {number: known[number] for number in map(str, versions.earlier)}


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _link_or_copy(source: str, target: str) -> None:
    """Versions that stay share their files' content; nothing writes into them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
