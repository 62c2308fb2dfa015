"""The ensemble that takes raw texts or image files, for clients that can only send bytes.

    text  -> rekd_prepare -> input_ids, attention_mask -> rekd_selector -> rekd_predictor -> rekd_answer -> label, ...
    image -> rekd_prepare -> pixels ...

``rekd_text`` (``rekd_image``) stands beside ``rekd`` and runs the same component models, or ``rekd_single`` in their
place where it was exported: one step fewer. The two steps of its own run in Triton's python backend, whatever runs the
graphs, on the very preprocessing of training: its modules are copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rekd_deploy.contract.description import LABELS, Artefacts
from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.repository.build import triton_dims
from rekd_deploy.repository.config import PREDICTOR, SELECTOR, SINGLE, ServingSettings
from rekd_train.files import write_json, write_text
from rekd_train.inputs.text import TOKENIZER_FILE

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

PREPARE, ANSWER = "rekd_prepare", "rekd_answer"
RAW = {"text": "rekd_text", "image": "rekd_image"}
"""The ensemble by what it takes."""
STEP = "step"
"""Parameter of the two steps: which of them a model is."""
_TRAINING = Path(__file__).resolve().parents[2] / "rekd_train"
_MODULES = ("__init__", "errors", "inputs/__init__", "inputs/prediction", "inputs/items")
"""What the steps import of rekd_train, beside inputs/text or inputs/image."""
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8"}
_Tensor = tuple[str, str, list[int]]


def raw_configs(artefacts: Artefacts, settings: ServingSettings) -> dict[str, ModelConfig]:
    """The configurations of the ensemble and its two steps, by model name."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelEnsembling

    kind = artefacts.preprocessor.settings.kind
    signature = artefacts.signature
    given = [(kind, "TYPE_STRING", [1])]
    handed = {
        "text": [("tokens", "TYPE_INT32", [-1, 4]), ("cut", "TYPE_BOOL", [1])], "image": [("sizes", "TYPE_INT64", [2])],
    }[kind]
    probabilities = next(spec for spec in signature.predictor.outputs if spec.name == "probabilities")
    rationale = [spec for spec in signature.selector.outputs if spec.name in ("scores", "mask")]
    read = [*(given if kind == "text" else ()), *handed, *_tensors(GraphSignature((*rationale, probabilities), ()))]
    answers = [
        ("label", "TYPE_STRING", [1]), ("rationale", "TYPE_STRING", [1]), ("rate", "TYPE_FP32", [1]),
        ("truncated", "TYPE_BOOL", [1]), ("probabilities", "TYPE_FP32", [len(artefacts.labels)]),
    ]
    prepared = [*_tensors(GraphSignature(signature.selector.inputs, ())), *handed]
    whole = ModelConfig(name=RAW[kind], platform="ensemble", max_batch_size=settings.max_batch_size)
    _declare(whole, given, answers)
    whole.parameters[LABELS].string_value = json.dumps(artefacts.labels, ensure_ascii=False)
    taken = [spec.name for spec in signature.selector.inputs]
    if artefacts.single is None:
        graphs = {
            SELECTOR: (taken, [spec.name for spec in signature.selector.outputs]),
            PREDICTOR: ([spec.name for spec in signature.predictor.inputs], ["probabilities"]),
        }
    else:
        graphs = {SINGLE: (taken, ["scores", "mask", "probabilities"])}
    steps = {
        PREPARE: (_names(given), _names(prepared)), **graphs, ANSWER: (_names(read), _names(answers)),
    }
    for model, (inputs, outputs) in steps.items():
        step = ModelEnsembling.Step(model_name=model, model_version=-1)
        # an answer of the ensemble must feed no step (Triton deadlocks), so between two steps it has another name
        for name in inputs:
            step.input_map[name] = "calibrated" if model == ANSWER and name == "probabilities" else name
        for name in outputs:
            step.output_map[name] = "calibrated" if model != ANSWER and name == "probabilities" else name
        whole.ensemble_scheduling.step.append(step)
    return {
        PREPARE: _step(PREPARE, "prepare", given, prepared, settings),
        ANSWER: _step(ANSWER, "answer", read, answers, settings),
        RAW[kind]: whole,
    }


def place_raw(artefacts: Artefacts, root: Path, version: int) -> None:
    """Write the files of the two steps, and the ensemble's version folder, into a repository."""
    preprocessor = artefacts.preprocessor
    kind = preprocessor.settings.kind
    for name in (PREPARE, ANSWER):
        folder = root / name / str(version)
        (folder / "rekd_train" / "inputs").mkdir(parents=True)
        shutil.copyfile(Path(__file__).parent / "backend" / "text.py", folder / "model.py")
        for module in (*_MODULES, f"inputs/{kind}"):
            shutil.copyfile(_TRAINING / f"{module}.py", folder / "rekd_train" / f"{module}.py")
        write_json(folder / "served.json", {"settings": asdict(preprocessor.settings), "labels": artefacts.labels})
        if kind == "text" and name == PREPARE:
            write_text(folder / TOKENIZER_FILE, preprocessor.tokenizer_json)
    (root / RAW[kind] / str(version) / ".gitkeep").touch()


def _step(
    name: str, step: str, inputs: Iterable[_Tensor], outputs: Iterable[_Tensor], settings: ServingSettings
) -> ModelConfig:
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelDynamicBatching, ModelInstanceGroup

    config = ModelConfig(name=name, backend="python", max_batch_size=settings.max_batch_size)
    _declare(config, inputs, outputs)
    if name != PREPARE:  # its batches would fail whole where the bytes of one request do not add up: Triton's check
        config.dynamic_batching.CopyFrom(ModelDynamicBatching())  # several requests at a call, no waiting
        for tensor in config.input:
            tensor.allow_ragged_batch = True  # each request is answered alone, whatever its length
    config.instance_group.append(ModelInstanceGroup(count=settings.instances, kind=ModelInstanceGroup.KIND_CPU))
    config.parameters[STEP].string_value = step
    return config


def _declare(config: ModelConfig, inputs: Iterable[_Tensor], outputs: Iterable[_Tensor]) -> None:
    from tritonclient.grpc.model_config_pb2 import DataType

    for declared, tensors in ((config.input, inputs), (config.output, outputs)):
        for name, data_type, dims in tensors:
            declared.add(name=name, data_type=DataType.Value(data_type), dims=dims)


def _tensors(signature: GraphSignature) -> list[_Tensor]:
    return [(spec.name, _TYPES[spec.dtype], triton_dims(spec)) for spec in signature.inputs]


def _names(tensors: Iterable[_Tensor]) -> list[str]:
    return [name for name, _, _ in tensors]
