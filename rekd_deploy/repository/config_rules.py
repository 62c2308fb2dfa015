"""What a config.pbtxt must respect, found on a real server: Triton ignores or crashes on some mistakes, we name them.

Every function returns the list of mistakes, so that one message can hold them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rekd_deploy.contract.description import FINGERPRINT, LABELS, PREPROCESSING, TOKENIZER, VERSION
from rekd_deploy.repository.config import (
    ARENA,
    ENGINE,
    EXECUTION_MODE,
    INTER_THREADS,
    LABEL_FILE,
    MAX_LENGTH,
    MEMORY_PATTERN,
    PAD_ID,
    SHRINKAGE,
    THREADS,
    VOCABULARY_SIZE,
)
from rekd_deploy.repository.config_members import member_mistakes

if TYPE_CHECKING:
    import onnx
    from tritonclient.grpc.model_config_pb2 import ModelConfig

STEP = "step"
"""Parameter of the steps of raw input: which of them a model is."""
_DESCRIPTION = {LABELS, PREPROCESSING, TOKENIZER, FINGERPRINT, VERSION}
KNOWN_PARAMETERS = {
    "python": {THREADS, MAX_LENGTH, VOCABULARY_SIZE, PAD_ID, ENGINE, STEP, *_DESCRIPTION},
    "onnxruntime": {THREADS, INTER_THREADS, EXECUTION_MODE, ARENA, MEMORY_PATTERN, SHRINKAGE, *_DESCRIPTION},
    "tensorrt": _DESCRIPTION,
    "ensemble": _DESCRIPTION,
}
"""Triton ignores an unknown key without a word, so a misspelt one would have no effect."""

NEWEST_IR, NEWEST_OPSET = 10, 21
"""Of the file format and the operators that Triton 24.10's ONNX Runtime (1.19) reads."""
_ONNX_TYPES = {"TYPE_INT64": 7, "TYPE_FP32": 1, "TYPE_BOOL": 9, "TYPE_FP16": 10, "TYPE_INT32": 6, "TYPE_UINT8": 2}


def config_mistakes(configs: Mapping[str, ModelConfig]) -> list[str]:
    """Mistakes in a repository's configurations, by model name."""
    mistakes = []
    for name, config in configs.items():
        if config.name != name:
            mistakes.append(f"{name}: the config is named '{config.name}'; folder and name must be equal")
        mistakes += [f"{name}: {mistake}" for mistake in _common_mistakes(config)]
        if config.platform == "ensemble":
            mistakes += [f"{name}: {mistake}" for mistake in _ensemble_mistakes(config, configs)]
        else:
            mistakes += [f"{name}: {mistake}" for mistake in member_mistakes(config)]
    return mistakes


def _common_mistakes(config: ModelConfig) -> list[str]:
    mistakes = []
    if config.max_batch_size < 1:
        mistakes.append(f"max_batch_size is {config.max_batch_size}; it must be at least 1")
    for tensor in (*config.input, *config.output):
        if not tensor.dims or any(size == 0 or size < -1 for size in tensor.dims):
            mistakes.append(f"{tensor.name}: dims {list(tensor.dims)} must be -1 or positive, without the batch axis")
        if tensor.data_type == 0:
            mistakes.append(f"{tensor.name}: data_type is missing")
        if tensor.HasField("reshape"):
            mistakes.append(f"{tensor.name}: reshape is not allowed; the graph's own shapes are served")
    for tensor in config.output:
        if tensor.label_filename not in ("", LABEL_FILE) or (tensor.label_filename and list(tensor.dims)[1:]):
            mistakes.append(f"{tensor.name}: label_filename must be {LABEL_FILE}, of an output (B, C)")
    if any(version < 1 for version in config.version_policy.specific.versions):
        mistakes.append("version_policy: versions are 1 or more")
    for kind, tensors in (("input", config.input), ("output", config.output)):
        if not tensors:
            mistakes.append(f"no {kind} is declared")
        counts = Counter(tensor.name for tensor in tensors)
        mistakes += [f"{kind} {name} is declared twice" for name, count in counts.items() if count > 1]
    known = KNOWN_PARAMETERS.get(config.platform or config.backend)
    if known is None:
        mistakes.append(f"backend '{config.backend}' or platform '{config.platform}' is unknown")
    else:
        unknown = sorted(set(config.parameters) - known)
        mistakes += [f"parameter {key} is unknown and would be ignored" for key in unknown]
    return mistakes


def _ensemble_mistakes(config: ModelConfig, configs: Mapping[str, ModelConfig]) -> list[str]:
    mistakes = [
        f"{field} is not allowed in an ensemble; set it in the component models"
        for field, present in (
            ("dynamic_batching", config.HasField("dynamic_batching")),
            ("instance_group", bool(config.instance_group)),
            ("model_warmup", bool(config.model_warmup)),
            ("allow_ragged_batch", any(tensor.allow_ragged_batch for tensor in config.input)),
        )
        if present
    ]
    tensors = {tensor.name: tensor for tensor in config.input}
    produced_by_steps: set[str] = set()
    used: set[str] = set()
    for step in config.ensemble_scheduling.step:
        member = configs.get(step.model_name)
        if member is None:
            mistakes.append(f"step {step.model_name} is not in this repository")
            continue
        if step.model_version == 0:
            mistakes.append(f"step {step.model_name}: model_version must be written (-1: the latest)")
        served = member.version_policy.specific.versions
        if step.model_version > 0 and served and step.model_version not in served:
            mistakes.append(
                f"step {step.model_name} runs version {step.model_version}, but {', '.join(map(str, served))} is served"
            )
        if config.max_batch_size > member.max_batch_size:
            mistakes.append(
                f"max_batch_size {config.max_batch_size} is above {member.max_batch_size} of {step.model_name}"
            )
        if set(step.input_map) != {tensor.name for tensor in member.input}:
            mistakes.append(f"step {step.model_name}: input_map must name every input of the model and nothing else")
        for tensor in member.input:
            source = step.input_map.get(tensor.name)
            used.add(source)
            if source is not None and source not in tensors:
                mistakes.append(f"step {step.model_name}: nothing before it produces {source}")
            elif source is not None and not _fits(tensors[source], tensor):
                mistakes.append(f"step {step.model_name}: {source} does not have the type and dims of {tensor.name}")
        outputs = {tensor.name: tensor for tensor in member.output}
        for name, target in step.output_map.items():
            if name not in outputs:
                mistakes.append(f"step {step.model_name} has no output {name}")
            elif target in tensors:
                mistakes.append(f"{target} is produced twice")
            else:
                tensors[target] = outputs[name]
                produced_by_steps.add(target)
    if not config.ensemble_scheduling.step:
        mistakes.append("there is no step")
    answers = {tensor.name for tensor in config.output}
    for tensor in config.output:
        if tensor.name not in produced_by_steps:
            mistakes.append(f"output {tensor.name} is produced by no step")
        elif not _fits(tensors[tensor.name], tensor):
            mistakes.append(f"output {tensor.name} does not have the type and dims its step gives")
    mistakes += [f"{name} is used by nothing" for name in sorted(set(tensors) - used - answers)]
    mistakes += [
        f"{name} is an answer and feeds a later step: Triton deadlocks when only some outputs are asked for"
        for name in sorted(answers & used)
    ]
    return mistakes


def graph_mistakes(config: ModelConfig, graph: Path) -> list[str]:
    """Mistakes in a model's config against the ONNX graph it will run."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        whole = onnx.load(str(graph), load_external_data=False)
    except (OSError, DecodeError) as error:
        return [f"{config.name}: {graph} is no ONNX file ({error}); fix: export again"]
    model = whole.graph
    weights = {weight.name for weight in model.initializer}
    inputs = {value.name: value for value in model.input if value.name not in weights}
    outputs = {value.name: value for value in model.output}
    mistakes = [f"{config.name}: {mistake}" for mistake in _format_mistakes(config, whole)]
    if set(inputs) != {tensor.name for tensor in config.input}:
        mistakes.append(f"{config.name}: the graph's inputs are {', '.join(inputs)}, the config's differ")
    for kind, values, tensors in (("input", inputs, config.input), ("output", outputs, config.output)):
        for tensor in tensors:
            where = f"{config.name}: {kind} {tensor.name}"
            value = values.get(tensor.name)
            if value is None:
                mistakes.append(f"{where} is not in the graph")
                continue
            if value.type.tensor_type.elem_type != _onnx_type(tensor.data_type):
                mistakes.append(f"{where} has another type in the graph")
            axes = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
            if axes[:1] != [-1]:
                mistakes.append(f"{where}: the graph's first axis is not a free batch axis")
            if axes[1:] != list(tensor.dims):
                mistakes.append(f"{where}: dims {list(tensor.dims)} differ from the graph's {axes[1:]}")
    return mistakes


def _format_mistakes(config: ModelConfig, model: onnx.ModelProto) -> list[str]:
    """What the onnxruntime backend could not read or run in a file."""
    if config.backend != "onnxruntime":
        return []
    from rekd_deploy.graphs.fusion import has_added_mask

    mistakes = []
    if model.ir_version > NEWEST_IR:
        mistakes.append(f"the graph has ONNX IR {model.ir_version}; Triton 24.10 reads up to {NEWEST_IR}")
    for entry in model.opset_import:
        if entry.domain == "" and entry.version > NEWEST_OPSET:
            mistakes.append(f"the graph has opset {entry.version}; Triton 24.10 reads up to {NEWEST_OPSET}")
    on_cpu = any(group.kind == group.KIND_CPU for group in config.instance_group)
    if on_cpu and any(map(has_added_mask, model.graph.node)):
        mistakes.append("the graph adds a mask to all heads at once, which ONNX Runtime 1.19 refuses at every request")
    return mistakes


def _fits(given, wanted) -> bool:
    return given.data_type == wanted.data_type and list(given.dims) == list(wanted.dims)


def _onnx_type(data_type: int) -> int | None:
    from tritonclient.grpc.model_config_pb2 import DataType

    return _ONNX_TYPES.get(DataType.Name(data_type))
