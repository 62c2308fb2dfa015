"""What a config.pbtxt must respect, found on a real server: Triton ignores or crashes on some mistakes, we name them.

Every function returns the list of mistakes, so that one message can hold them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.served import FINGERPRINT, LABELS, PREPROCESSING, TOKENIZER, VERSION
from rekd_deploy.triton_config import ENGINE, MAX_LENGTH, THREADS, VOCABULARY_SIZE, parameters_of

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

STEP = "step"
"""Parameter of the steps of raw input: which of them a model is."""
_DESCRIPTION = {LABELS, PREPROCESSING, TOKENIZER, FINGERPRINT, VERSION}
KNOWN_PARAMETERS = {
    "python": {THREADS, MAX_LENGTH, VOCABULARY_SIZE, ENGINE, STEP, *_DESCRIPTION},
    "onnxruntime": {THREADS, *_DESCRIPTION},
    "tensorrt": _DESCRIPTION,
    "ensemble": _DESCRIPTION,
}
"""Triton ignores an unknown key without a word, so a misspelt one would have no effect."""

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
            mistakes += [f"{name}: {mistake}" for mistake in _member_mistakes(config)]
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


def _member_mistakes(config: ModelConfig) -> list[str]:
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    mistakes = []
    if not config.instance_group:
        mistakes.append("instance_group is missing; Triton would choose for itself")
    for group in config.instance_group:
        if group.count < 1 or group.kind not in (ModelInstanceGroup.KIND_CPU, ModelInstanceGroup.KIND_GPU):
            mistakes.append("instance_group must have a count of at least 1 and KIND_CPU or KIND_GPU")
    batching = config.dynamic_batching
    for size in batching.preferred_batch_size:
        if not 1 <= size <= config.max_batch_size:
            mistakes.append(f"preferred_batch_size {size} is outside 1..max_batch_size ({config.max_batch_size})")
    threads = parameters_of(config).get(THREADS, "0")
    if not threads.isdecimal():
        mistakes.append(f"intra_op_thread_count '{threads}' must be a whole number, 0 or more")
    if (config.backend == "tensorrt" or ENGINE in config.parameters) and any(
        group.kind != ModelInstanceGroup.KIND_GPU for group in config.instance_group
    ):
        mistakes.append("an engine runs on a GPU only; instance_group must be KIND_GPU")
    for warmup in config.model_warmup:
        mistakes += _warmup_mistakes(config, warmup)
    return mistakes


def _warmup_mistakes(config: ModelConfig, warmup) -> list[str]:
    from tritonclient.grpc.model_config_pb2 import DataType

    declared = {tensor.name: tensor for tensor in config.input}
    mistakes = []
    if set(warmup.inputs) != set(declared):
        mistakes.append(f"warm-up {warmup.name} must give exactly the inputs {', '.join(declared)}")
    for name, given in warmup.inputs.items():
        tensor = declared.get(name)
        if tensor is None:
            continue
        if given.data_type != tensor.data_type or len(given.dims) != len(tensor.dims) or any(d < 1 for d in given.dims):
            mistakes.append(f"warm-up {warmup.name}: {name} needs the input's type and concrete dims without the batch")
        if given.random_data and tensor.data_type != DataType.Value("TYPE_FP32"):
            mistakes.append(f"warm-up {warmup.name}: random_data for {name} draws any int64; use zero_data")
    return mistakes


def _ensemble_mistakes(config: ModelConfig, configs: Mapping[str, ModelConfig]) -> list[str]:
    mistakes = [
        f"{field} is not allowed in an ensemble; set it in the members"
        for field, present in (
            ("dynamic_batching", config.HasField("dynamic_batching")),
            ("instance_group", bool(config.instance_group)),
            ("model_warmup", bool(config.model_warmup)),
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
    """Mistakes in a member's config against the ONNX graph it will run."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(graph), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        return [f"{config.name}: {graph} is no ONNX file ({error}); fix: export again"]
    weights = {weight.name for weight in model.initializer}
    inputs = {value.name: value for value in model.input if value.name not in weights}
    outputs = {value.name: value for value in model.output}
    mistakes = []
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


def engine_mistakes(config: ModelConfig, entry: Mapping[str, Any]) -> list[str]:
    """Mistakes in a member's config against the shapes of the engine it will run.

    Args:
        entry: the engine's manifest entry.
    """
    profiles = entry["profiles"]
    mistakes = []
    for index, profile in enumerate(profiles):
        where = f"{config.name}: profile {index}"
        if set(profile) != {tensor.name for tensor in config.input}:
            mistakes.append(f"{where} is for the inputs {', '.join(profile)}, the config's differ")
            continue
        for tensor in config.input:
            smallest, _, largest = profile[tensor.name]
            fixed = [size if size == other else -1 for size, other in zip(smallest[1:], largest[1:], strict=True)]
            if len(fixed) != len(tensor.dims) or any(
                size not in (-1, found) for size, found in zip(tensor.dims, fixed, strict=False)
            ):
                mistakes.append(f"{where}: dims {list(tensor.dims)} of {tensor.name} differ from the engine's {fixed}")
    most = max((shapes[2][0] for profile in profiles for shapes in profile.values()), default=0)
    if config.max_batch_size > most:
        mistakes.append(f"{config.name}: max_batch_size {config.max_batch_size} is above the engine's {most}")
    if config.backend == "tensorrt":
        wanted = [str(index) for index in range(len(profiles))]
        for group in config.instance_group:
            if list(group.profile) != wanted:
                mistakes.append(f"{config.name}: instance_group has the profiles {list(group.profile)}, not {wanted}")
    return mistakes


def _fits(given, wanted) -> bool:
    return given.data_type == wanted.data_type and list(given.dims) == list(wanted.dims)


def _onnx_type(data_type: int) -> int | None:
    from tritonclient.grpc.model_config_pb2 import DataType

    return _ONNX_TYPES.get(DataType.Name(data_type))
