"""The text or image endpoint: the ensemble for clients that can only send bytes.

    text  -> rekd_prepare -> input_ids, attention_mask -> rekd_selector -> rekd_predictor -> rekd_answer -> label, ...
    image -> rekd_prepare -> pixels ...

``rekd_text`` (``rekd_image``) runs the component models of ``rekd``, or ``rekd_single`` where it was exported: one step
fewer. The two steps of its own run in Triton's python backend, on copies of the modules that training prepares with.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.description import LABELS, Artefacts, ServedDescription
from rekd_deploy.repository import config
from rekd_deploy.repository.config import ServingSettings
from rekd_train.files import write_json, write_text
from rekd_train.inputs.text import TOKENIZER_FILE

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

_TRAINING = Path(__file__).resolve().parents[2] / "rekd_train"
_MODULES = ("__init__", "errors", "inputs/__init__", "inputs/prediction", "inputs/familiarity")
"""What the steps import of rekd_train, beside inputs/text or inputs/image."""


def endpoint_configs(artefacts: Artefacts, settings: ServingSettings) -> dict[str, ModelConfig]:
    """The configurations of the ensemble and its two steps, by model name."""
    kind, pair = artefacts.preprocessor.settings.kind, artefacts.signature
    content = [_tensor(kind, "STRING", 1)]
    handed = {
        "text": [_tensor("tokens", "INT32", -1, 4), _tensor("cut", "BOOL", 1)], "image": [_tensor("sizes", "INT64", 2)]
    }[kind]
    computed = config.tensors(spec for spec in pair.ensemble.outputs if spec.name != "logits")
    read = [*(content if kind == "text" else ()), *handed, *computed]
    ragged = [{**each, "allow_ragged_batch": True} for each in read]
    answers = [
        _tensor("label", "STRING", 1), _tensor("rationale", "STRING", 1), _tensor("rate", "FP32", 1),
        _tensor("truncated", "BOOL", 1), _tensor("probabilities", "FP32", len(artefacts.labels)),
    ]
    taken = config.tensors(pair.selector.inputs)
    told = [_tensor("doubt", "FP32", 1)] if ServedDescription.of(artefacts.preprocessor, ()).familiarity else []
    prepared = [*taken, *handed, *told]
    graphs = [config.step(config.SINGLE, taken, computed)]
    if artefacts.single is None:
        chosen = config.step(config.SELECTOR, taken, config.tensors(pair.selector.outputs))
        graphs = [chosen, config.step(config.PREDICTOR, config.tensors(pair.predictor.inputs), computed[-1:])]
    steps = [config.step(config.PREPARE, content, prepared), *graphs, config.step(config.ANSWER, read, answers)]
    # an output of the ensemble must feed no step (Triton deadlocks), so between two steps it has another name
    steps[-2]["output_map"]["probabilities"] = steps[-1]["input_map"]["probabilities"] = "calibrated"
    whole = {
        "name": config.ENDPOINTS[kind], "platform": "ensemble", "max_batch_size": settings.max_batch_size,
        "input": content, "output": [*answers, *told], "ensemble_scheduling": {"step": steps},
        "parameters": config.strings({LABELS: json.dumps(artefacts.labels, ensure_ascii=False)}),
    }
    # PREPARE has no batches: they would fail whole where the bytes of one request do not add up, by Triton's check
    return {
        config.PREPARE: _step_config(config.PREPARE, "prepare", content, prepared, settings),
        # several requests at a call, no waiting; each is answered alone, whatever its length
        config.ANSWER: _step_config(config.ANSWER, "answer", ragged, answers, settings, dynamic_batching={}),
        config.ENDPOINTS[kind]: config.parsed(whole),
    }


def place_endpoint(artefacts: Artefacts, root: Path, version: str) -> None:
    """Write the files of the two steps, and the ensemble's version folder, into a repository."""
    preprocessor = artefacts.preprocessor
    kind = preprocessor.settings.kind
    for name in (config.PREPARE, config.ANSWER):
        folder = root / name / version
        (folder / "rekd_train" / "inputs").mkdir(parents=True)
        for source, code in (("endpoint", "model"), ("tensors", "triton_tensors")):
            shutil.copyfile(Path(__file__).parent / "backend" / f"{source}.py", folder / f"{code}.py")
        for module in (*_MODULES, f"inputs/{kind}"):
            shutil.copyfile(_TRAINING / f"{module}.py", folder / "rekd_train" / f"{module}.py")
        served = {"settings": asdict(preprocessor.settings), "labels": artefacts.labels}
        if name == config.PREPARE:
            served["familiarity"] = ServedDescription.of(preprocessor, ()).familiarity
        write_json(folder / "served.json", served)
        if kind == "text" and name == config.PREPARE:
            write_text(folder / TOKENIZER_FILE, preprocessor.tokenizer_json)
    (root / config.ENDPOINTS[kind] / version / ".gitkeep").touch()


def _tensor(name: str, data_type: str, *dims: int) -> dict[str, Any]:
    return {"name": name, "data_type": f"TYPE_{data_type}", "dims": list(dims)}


def _step_config(
    name: str, role: str, inputs: list[Any], outputs: list[Any], settings: ServingSettings, **more: Any
) -> ModelConfig:
    return config.parsed({
        "name": name, "backend": "python", "max_batch_size": settings.max_batch_size, "input": inputs,
        "output": outputs, "instance_group": [{"count": settings.instances, "kind": "KIND_CPU"}],
        "parameters": config.strings({"step": role}), **more,
    })
