"""A model repository for Triton: written whole or not at all, checked before it is served.

    ROOT/manifest.json                      what was exported, and the SHA-256 of every file below
    ROOT/parity.npz                         a few inputs and the PyTorch model's answers, to verify the graphs by
    ROOT/rekd_selector/config.pbtxt         component model, with 1/model.onnx, 1/model.py, 1/triton_*.py
    ROOT/rekd_predictor/config.pbtxt        component model, likewise
    ROOT/rekd_single/config.pbtxt           both steps in one graph, if it was exported; likewise
                                            with engines, 1/model.plan and what runs it, too
    ROOT/rekd/config.pbtxt                  ensemble, with an empty version folder (Triton requires it)

A later export to the same place is version 2, and so on (see rekd_deploy.repository.manifest).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rekd_deploy.contract.artefacts import Artefacts
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.build import build_configs
from rekd_deploy.repository.config import CONFIG_FILE, ENSEMBLE, ServingSettings, config_text, graph_mistakes
from rekd_deploy.repository.manifest import COMPONENTS, Versions, check_side_by_side, newest_folder, pin_versions
from rekd_deploy.repository.reader import (
    FORMAT,
    FORMAT_VERSION,
    GRAPH,
    GRAPH_MODELS,
    MANIFEST,
    PLAN,
    REFERENCE,
    check_repository,
    models_of,
    read_description,
    read_manifest,
    refuse_foreign_folder,
)
from rekd_deploy.repository.text_endpoint import PREPARE, place_raw, raw_configs
from rekd_deploy.repository.warmups import model_files
from rekd_deploy.repository.workspaces import one_at_a_time, replacing
from rekd_train.files import sha256, write_bytes, write_json, write_text

__all__ = [
    "GRAPH", "GRAPH_MODELS", "MANIFEST", "check_repository", "next_versions", "read_description", "read_manifest",
    "write_repository",
]
_CACHES = shutil.ignore_patterns("__pycache__")
"""A server that may write leaves them beside its models."""
_MODEL_CODE = {
    name: Path(__file__).parent / "backend" / source
    for name, source in {
        "model.py": "model.py", "triton_batches.py": "batches.py", "triton_cuda.py": "cuda.py"
    }.items()
}
_ENGINE_CODE = Path(__file__).parents[1] / "runtimes" / "tensorrt_execution.py"
_EARLIER_KEYS = ("versions", "checkpoint_sha256", "artefacts", "preprocessing_sha256")
"""What the manifest keeps of the versions before."""


def write_repository(
    artefacts: Artefacts,
    root: Path,
    *,
    target: str = "python",
    max_batch_size: int = 64,
    preferred_batch_sizes: tuple[int, ...] = ServingSettings.preferred_batch_sizes,
    instances: int = 1,
    threads: int = 0,
    queue_delay_us: int = 0,
    gpu: bool = False,
    gpus: tuple[int, ...] = (),
    rate_limit: bool = False,
    keep: int = 1,
    text_endpoint: bool = False,
) -> Path:
    """Place verified graphs in a repository that Triton serves.

    Until the new repository is whole, the old one is; the same export once more changes nothing.

    Args:
        root: the repository; an older one there becomes the version before, anything else is refused.
        target: which backend runs the graphs.
        max_batch_size: most texts or images in one request and in one dynamic batch.
        instances: processes of each component model.
        threads: threads of each process inside one operation; 0: the instances share the cores.
        preferred_batch_sizes: what the scheduler aims at.
        queue_delay_us: microseconds a request may wait for others to form a preferred batch.
        gpu: whether ONNX Runtime runs on GPUs.
        gpus: numbers of the GPUs to run on; empty: every one that is there.
        rate_limit: executions take one of the server's resource 'rekd' each.
        keep: versions that stay, the new one included.
        text_endpoint: add the ensemble that takes raw texts or image files.

    Raises:
        RepositoryError: the folder holds something else, configs and graphs do not fit each other, or earlier
            versions that should stay are damaged or do not fit beside the new one.
        ConfigError: a number is out of range.
    """
    settings = ServingSettings(
        max_batch_size=max_batch_size, preferred_batch_sizes=preferred_batch_sizes, instances=instances,
        threads=threads, queue_delay_us=queue_delay_us, gpu=gpu, gpus=gpus, rate_limit=rate_limit,
    )
    root = Path(root)
    configs = build_configs(artefacts, settings, target)
    if text_endpoint:
        configs |= raw_configs(artefacts, settings)
    with one_at_a_time(root):  # versions are counted and replaced by one export after the other
        refuse_foreign_folder(root)
        if not _is_unchanged(root, artefacts, configs, target, keep):
            _write(artefacts, root, configs, target, keep, settings)
    return root


def _write(
    artefacts: Artefacts, root: Path, configs: Mapping[str, Any], target: str, keep: int, settings: ServingSettings
) -> None:
    versions, earlier = next_versions(root, configs, keep)
    pin_versions(configs, versions)
    graphs = {GRAPH_MODELS[role]: path for role, path in artefacts.graphs.items()}
    if mistakes := [mistake for name, graph in graphs.items() for mistake in graph_mistakes(configs[name], graph)]:
        raise RepositoryError("the repository would not load: " + "; ".join(mistakes))
    current = str(versions.current)
    with replacing(root) as work:
        for name, config in configs.items():
            (work / name / current).mkdir(parents=True)
            write_text(work / name / CONFIG_FILE, config_text(config))
        for name, content in model_files(configs, artefacts).items():
            (work / name).parent.mkdir(exist_ok=True)
            write_bytes(work / name, content)
        for name in COMPONENTS:
            for version in map(str, versions.earlier):
                old, new = root / name / version, work / name / version
                shutil.copytree(old, new, copy_function=_link_or_copy, ignore=_CACHES)
        for name, graph in graphs.items():
            _place_graph(graph, work / name / current)
        for name, source in _beside_graphs(artefacts, target, current).items():
            shutil.copyfile(source, work / name)
        (work / ENSEMBLE / current / ".gitkeep").touch()
        if PREPARE in configs:
            place_raw(artefacts, work, versions.current)
        if artefacts.reference is not None:
            shutil.copyfile(artefacts.reference, work / REFERENCE)
        files, most = _digests(work), settings.max_batch_size
        described = {
            "format": FORMAT, "version": FORMAT_VERSION, "target": target, "model_version": versions.current,
            "batches": sorted({*(n for n in settings.preferred_batch_sizes if n <= most), most}),
            "earlier": earlier, "files": files,
        }
        write_json(work / MANIFEST, {**artefacts.manifest, "repository": described})


def _is_unchanged(root: Path, artefacts: Artefacts, configs: Mapping[str, Any], target: str, keep: int) -> bool:
    """Whether this very export lies at ``root`` already, whole. It pins the configs to the versions there."""
    try:
        manifest = check_repository(root)
    except RepositoryError:
        return False
    versions, described = Versions.of(manifest), manifest.pop("repository")
    if len(versions.components) > keep or described["target"] != target or manifest != _as_json(artefacts.manifest):
        return False
    pin_versions(configs, versions)
    texts = {f"{name}/{CONFIG_FILE}": config_text(config) for name, config in configs.items()}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in model_files(configs, artefacts).items()}
    beside = _beside_graphs(artefacts, target, str(versions.current))
    digests |= {name: sha256(source) for name, source in beside.items()}
    if artefacts.reference is not None:
        digests[REFERENCE] = sha256(artefacts.reference)
    if PREPARE in configs:
        with tempfile.TemporaryDirectory() as folder:
            for name in configs:
                (Path(folder) / name / str(versions.current)).mkdir(parents=True)
            place_raw(artefacts, Path(folder), versions.current)
            digests |= _digests(Path(folder))
    return set(models_of(described["files"])) == set(configs) and digests.items() <= described["files"].items()


def next_versions(root: Path, configs: Mapping[str, Any], keep: int) -> tuple[Versions, dict[str, Any]]:
    """The versions of the new repository, and what the manifest says about the earlier ones.

    Raises:
        RepositoryError: an earlier version should stay, but is damaged or does not fit beside the new one.
    """
    newest = newest_folder(root)
    if keep == 1 or not newest:
        return Versions(newest + 1), {}
    manifest = check_repository(root)  # what stays must be whole
    versions = Versions.of(manifest).after(keep)
    check_side_by_side(root, configs)
    known = manifest["repository"].get("earlier", {})
    known[str(versions.current - 1)] = {key: manifest[key] for key in _EARLIER_KEYS if key in manifest}
    return versions, {number: known[number] for number in map(str, versions.earlier)}


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _beside_graphs(artefacts: Artefacts, target: str, version: str) -> dict[str, Path]:
    """What lies beside the graphs in the version folders, and where it comes from."""
    found = {}
    for role in artefacts.graphs:
        folder = f"{GRAPH_MODELS[role]}/{version}"
        if target == "python":
            found |= {f"{folder}/{name}": source for name, source in _MODEL_CODE.items()}
        if role in artefacts.engines:
            found[f"{folder}/{PLAN}"] = artefacts.engines[role]
            if target == "python":
                found[f"{folder}/tensorrt_execution.py"] = _ENGINE_CODE
    return found


def _as_json(content: Any) -> Any:
    return json.loads(json.dumps(content))


def _link_or_copy(source: str, target: str) -> None:
    """Versions that stay share their files' content; nothing writes into them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _place_graph(graph: Path, folder: Path) -> None:
    shutil.copyfile(graph, folder / GRAPH)
    weights = graph.with_name(graph.name + ".data")
    if weights.is_file():  # the graph names this file, so it keeps its name
        shutil.copyfile(weights, folder / weights.name)
