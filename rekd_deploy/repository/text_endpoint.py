"""The text or image endpoint: one model for clients that can only send bytes, ``rekd_text`` or ``rekd_image``.

    text  -> rekd_text  -> label, probabilities, rationale, rate, truncated, doubt
    image -> rekd_image -> the same without doubt

It runs in Triton's python backend whatever the target, on copies of the modules that training prepares with. On CPUs of
the target ``python`` it holds small graphs itself: one hop for a request. Elsewhere it asks the models that run them,
``rekd_single`` where it was exported, else selector and predictor; beside large graphs that hop is little.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rekd_deploy.contract.description import LABELS, Artefacts
from rekd_deploy.contract.signature import TensorSpec
from rekd_deploy.repository import config
from rekd_deploy.repository.build import shortest_length
from rekd_deploy.repository.config import ServingSettings
from rekd_train.files import write_json, write_text
from rekd_train.inputs.text import TOKENIZER_FILE

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

BACKEND = Path(__file__).parent / "backend"
COMPONENT_CODE = {"triton_graphs.py": BACKEND / "graphs.py", "triton_tensors.py": BACKEND / "tensors.py"}
"""What lies beside the code of every model of the python backend."""
_CODE = {"model.py": BACKEND / "endpoint.py", "triton_component.py": BACKEND / "model.py", **COMPONENT_CODE}
_TRAINING = Path(__file__).resolve().parents[2] / "rekd_train"
_MODULES = ("__init__", "errors", "inputs/__init__", "inputs/prediction", "inputs/familiarity")
"""What the endpoint imports of rekd_train, beside inputs/text or inputs/image."""
_HELD = 100_000_000
"""Bytes of the largest graphs that it holds: each of its processes needs as much memory, and more."""
_HOLDING, _ASKING = 2, 4
"""Instances, at least, of one that computes, as it takes its requests one by one; and of one that waits for others."""


def endpoint_config(artefacts: Artefacts, settings: ServingSettings, target: str = "python") -> ModelConfig:
    """The configuration of the endpoint; ``target``: which backend runs the graphs."""
    kind, entries = artefacts.preprocessor.settings.kind, artefacts.manifest.get("artefacts", {})
    size = sum(entries.get(role, {}).get("bytes", 0) for role in _roles(artefacts))
    on_gpu = settings.gpu or any("engine" in entry for entry in entries.values())
    holds = target == "python" and not on_gpu and size <= _HELD
    parameters = {LABELS: json.dumps(artefacts.labels, ensure_ascii=False)}
    if holds:
        parameters |= {config.THREADS: str(settings.threads)}
        parameters |= shortest_length(artefacts) if artefacts.joins_lengths else {}
    answers = {"label": ("STRING", 1), "rationale": ("STRING", 1), "rate": ("FP32", 1), "truncated": ("BOOL", 1)}
    answers["probabilities"] = ("FP32", len(artefacts.labels))
    if artefacts.description.familiarity:
        answers["doubt"] = ("FP32", 1)
    tensors = {kind: ("STRING", 1), **answers}
    declared = [{"name": name, "data_type": f"TYPE_{each}", "dims": [size]} for name, (each, size) in tensors.items()]
    # no batches: they would fail whole where the bytes of one request do not add up, by Triton's check
    return config.parsed({
        "name": config.ENDPOINTS[kind], "backend": "python", "max_batch_size": settings.max_batch_size,
        "input": declared[:1], "output": declared[1:], "parameters": config.strings(parameters),
        "instance_group": [
            {"count": max(settings.instances, _HOLDING if holds else _ASKING), "kind": "KIND_CPU"}
        ],
    })


def place_endpoint(artefacts: Artefacts, root: Path, configs: Mapping[str, ModelConfig], version: str) -> None:
    """Write the files of the endpoint that is among ``configs`` into a repository."""
    preprocessor, pair = artefacts.preprocessor, artefacts.signature
    kind = preprocessor.settings.kind
    name = config.ENDPOINTS[kind]
    folder = root / name / version
    (folder / "rekd_train" / "inputs").mkdir(parents=True)
    for file, source in _CODE.items():
        shutil.copyfile(source, folder / file)
    for module in (*_MODULES, f"inputs/{kind}"):
        shutil.copyfile(_TRAINING / f"{module}.py", folder / "rekd_train" / f"{module}.py")
    if kind == "text":
        write_text(folder / TOKENIZER_FILE, preprocessor.tokenizer_json)
    wanted = {spec.name for spec in (*pair.ensemble.outputs, *pair.handover)} - {"logits"}
    steps = []
    for role in _roles(artefacts):
        graph, model = pair.graph(role), config.GRAPH_MODELS[role]
        outputs = [spec for spec in graph.outputs if spec.name in wanted]
        steps.append({"model": model, "inputs": _names(graph.inputs), "outputs": _names(outputs)})
        if config.THREADS in configs[name].parameters:
            place_graph(artefacts.graphs[role], folder / model)
    served = {"settings": asdict(preprocessor.settings), "labels": artefacts.labels, "steps": steps}
    served["familiarity"] = artefacts.description.familiarity
    write_json(folder / "served.json", served)


def place_graph(graph: Path, folder: Path) -> None:
    """Copy a graph, and the weights beside it that it names, into a folder as ``model.onnx``."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(graph, folder / config.GRAPH)
    if (weights := graph.with_name(f"{graph.name}.data")).is_file():
        shutil.copyfile(weights, folder / weights.name)


def _roles(artefacts: Artefacts) -> tuple[str, ...]:
    """The graphs that answer a request, in order."""
    return ("selector", "predictor") if artefacts.single is None else ("single",)


def _names(specs: Iterable[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]
