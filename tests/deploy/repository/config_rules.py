"""What the configurations that exports write must respect, found on a real server and in the sources of its backends.

Triton ignores, stops at or crashes on what is named here. Every function returns the list of mistakes.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from rekd_deploy.contract.description import FINGERPRINT, LABELS, PREPROCESSING, TOKENIZER, VERSION
from rekd_deploy.repository.build import without_tf32
from rekd_deploy.repository.config import (
    ARENA,
    ENGINE,
    EXECUTION_MODE,
    INTER_THREADS,
    LABEL_FILE,
    MAX_LENGTH,
    MEMORY_PATTERN,
    PAD_ID,
    THREADS,
    VOCABULARY_SIZE,
    parameters_of,
)
from rekd_deploy.repository.text_endpoint import STEP
from rekd_deploy.repository.warmups import WARMUP

_DESCRIPTION = {LABELS, PREPROCESSING, TOKENIZER, FINGERPRINT, VERSION}
KNOWN_PARAMETERS = {
    "python": {THREADS, MAX_LENGTH, VOCABULARY_SIZE, PAD_ID, ENGINE, STEP, *_DESCRIPTION},
    "onnxruntime": {THREADS, INTER_THREADS, EXECUTION_MODE, ARENA, MEMORY_PATTERN, *_DESCRIPTION},
    "tensorrt": _DESCRIPTION,
    "ensemble": _DESCRIPTION,
}
"""Triton ignores an unknown key without a word, so a misspelt one would have no effect."""
_VALUES = {
    THREADS: r"\d{1,4}", INTER_THREADS: r"\d{1,4}", PAD_ID: r"\d{1,9}",
    EXECUTION_MODE: "[01]", ARENA: "[01]", MEMORY_PATTERN: "[01]",
}  # fmt: skip
"""Parameters that are numbers in disguise."""
_COMMON = {"name", "max_batch_size", "input", "output", "parameters", "version_policy"}
_FIELDS = {
    "ensemble": {*_COMMON, "platform", "ensemble_scheduling"},
    "component": {*_COMMON, "backend", "instance_group", "dynamic_batching", "model_warmup", "optimization"},
}
"""Others change what is served, or do nothing: sequence_batching, default_model_filename, ..."""
_TENSOR_FIELDS = {"name", "data_type", "dims", "allow_ragged_batch", "label_filename"}
"""Not optional, is_shape_tensor or reshape: the graph takes whole, padded batches, in its own shapes."""
_GROUP_FIELDS = {"count", "kind", "gpus", "profile", "rate_limiter"}
_WIDTHS = {"TYPE_INT64": 8, "TYPE_FP32": 4, "TYPE_BOOL": 1, "TYPE_UINT8": 1}
"""Bytes of an element."""


def config_mistakes(configs):
    """Mistakes in a repository's configurations, by model name."""
    mistakes = []
    for name, config in configs.items():
        own = [*_common_mistakes(config, name)]
        own += _ensemble_mistakes(config, configs) if config.platform == "ensemble" else component_mistakes(config)
        mistakes += [f"{name}: {mistake}" for mistake in own]
    return mistakes


def _unknown(message, known):
    return [f"{field.name} is not allowed" for field, _ in message.ListFields() if field.name not in known]


def _common_mistakes(config, name):
    if config.name != name:
        yield f"the config is named '{config.name}'; folder and name must be equal"
    yield from _unknown(config, _FIELDS["ensemble" if config.platform == "ensemble" else "component"])
    if config.max_batch_size < 1:
        yield f"max_batch_size is {config.max_batch_size}; it must be at least 1"
    for kind, tensors in (("input", config.input), ("output", config.output)):
        if not tensors:
            yield f"no {kind} is declared"
        counts = Counter(tensor.name for tensor in tensors)
        yield from (f"{kind} {name} is declared twice" for name, count in counts.items() if count > 1)
        for tensor in tensors:
            yield from _unknown(tensor, _TENSOR_FIELDS)
            if not tensor.data_type or not tensor.dims or any(size == 0 or size < -1 for size in tensor.dims):
                yield f"{tensor.name}: needs a type, and dims {list(tensor.dims)} -1 or positive, without the batch"
    for tensor in config.output:
        if tensor.label_filename and (tensor.label_filename != LABEL_FILE or len(tensor.dims) > 1):
            yield f"{tensor.name}: label_filename must be {LABEL_FILE}, of an output (B, C)"
    if any(version < 1 for version in config.version_policy.specific.versions):
        yield "version_policy: versions are 1 or more"
    known = KNOWN_PARAMETERS.get(config.platform or config.backend)
    if known is None:
        yield f"backend '{config.backend}' or platform '{config.platform}' is unknown"
    else:
        yield from (f"parameter {key} is unknown and would be ignored" for key in set(config.parameters) - known)


def _ensemble_mistakes(config, configs):
    tensors = {tensor.name: tensor for tensor in config.input}
    produced, used = set(), set()
    if any(tensor.allow_ragged_batch for tensor in config.input):
        yield "allow_ragged_batch is the component models'"
    if not config.ensemble_scheduling.step:
        yield "there is no step"
    for step in config.ensemble_scheduling.step:
        where, component = f"step {step.model_name}", configs.get(step.model_name)
        if component is None:
            yield f"{where} is not in this repository"
            continue
        served = component.version_policy.specific.versions
        if step.model_version == 0 or (step.model_version > 0 and served and step.model_version not in served):
            yield f"{where} runs version {step.model_version}, but {list(served)} is served"
        if config.max_batch_size > component.max_batch_size:
            yield f"max_batch_size {config.max_batch_size} is above {component.max_batch_size} of {step.model_name}"
        if set(step.input_map) != {tensor.name for tensor in component.input}:
            yield f"{where}: input_map must name every input of the model and nothing else"
        for tensor in component.input:
            source = step.input_map.get(tensor.name)
            used.add(source)
            if source is not None and source not in tensors:
                yield f"{where}: nothing before it produces {source}"
            elif source is not None and not _fits(tensors[source], tensor):
                yield f"{where}: {source} does not have the type and dims of {tensor.name}"
        outputs = {tensor.name: tensor for tensor in component.output}
        for name, target in step.output_map.items():
            if name not in outputs:
                yield f"{where} has no output {name}"
            elif target in tensors:
                yield f"{target} is produced twice"
            else:
                tensors[target] = outputs[name]
                produced.add(target)
    public = {tensor.name for tensor in config.output}
    for tensor in config.output:
        if tensor.name not in produced:
            yield f"output {tensor.name} is produced by no step"
        elif not _fits(tensors[tensor.name], tensor):
            yield f"output {tensor.name} does not have the type and dims its step gives"
    yield from (f"{name} is used by nothing" for name in set(tensors) - used - public)
    yield from (
        f"{name} is an output and feeds a later step: Triton deadlocks when only some outputs are requested"
        for name in public & used
    )


def _fits(given, wanted):
    return given.data_type == wanted.data_type and list(given.dims) == list(wanted.dims)


def component_mistakes(config):
    """Mistakes in the configuration of a model that is no ensemble."""
    on_gpu = any(group.kind == group.KIND_GPU for group in config.instance_group)
    if not config.instance_group:
        yield "instance_group is missing; Triton would choose for itself"
    for group in config.instance_group:
        yield from _unknown(group, _GROUP_FIELDS)
        if group.count < 1 or group.kind not in (group.KIND_CPU, group.KIND_GPU):
            yield "instance_group must have a count of at least 1 and KIND_CPU or KIND_GPU"
        if (group.gpus or group.profile) and group.kind != group.KIND_GPU:
            yield "instance_group names GPUs, or profiles of an engine, but is not KIND_GPU"
        if len(set(group.gpus)) != len(group.gpus) or any(gpu < 0 for gpu in group.gpus):
            yield f"instance_group: gpus {list(group.gpus)} must be 0 or more and differ"
        if any(not resource.name or resource.count < 1 for resource in group.rate_limiter.resources):
            yield "a resource of rate_limiter must have a name and a count of at least 1"
    for size in config.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= config.max_batch_size:
            yield f"preferred_batch_size {size} is outside 1..max_batch_size ({config.max_batch_size})"
    runs_graph = config.backend != "python" or MAX_LENGTH in config.parameters  # not a step that takes rows singly
    for tensor in config.input:
        if runs_graph and tensor.allow_ragged_batch != (PAD_ID in config.parameters):
            yield f"allow_ragged_batch of {tensor.name} must go with {PAD_ID}: nothing else pads several lengths"
    for key, value in parameters_of(config).items():
        if not re.fullmatch(_VALUES.get(key, ".*"), value, re.DOTALL):
            yield f"{key} '{value}' must be like {_VALUES[key]}"
    if (config.backend == "tensorrt" or ENGINE in config.parameters) and not on_gpu:
        yield "an engine runs on a GPU only; instance_group must be KIND_GPU"
    wanted = ModelConfig()
    if config.backend == "onnxruntime" and on_gpu:
        without_tf32(wanted)
    if config.optimization.execution_accelerators != wanted.optimization.execution_accelerators:
        yield "execution_accelerators: cuda with use_tf32 0 where ONNX Runtime runs on a GPU, none elsewhere"
    yield from _cuda_graph_mistakes(config)
    names = Counter(warmup.name for warmup in config.model_warmup)
    yield from (f"warm-up {name} is there twice" for name, count in names.items() if count > 1)
    for warmup in config.model_warmup:
        yield from _shape_mistakes(config, f"warm-up {warmup.name}", warmup.batch_size, {
            name: list(given.dims) for name, given in warmup.inputs.items()
        })
        for name, given in warmup.inputs.items():
            if not re.fullmatch(r"[\w.-]+", given.input_data_file):  # others draw any value, or are an empty input
                yield f"warm-up {warmup.name}: the data of {name} must be a file under warmup/"


def _cuda_graph_mistakes(config):
    cuda = config.optimization.cuda
    if cuda.graphs and config.backend != "tensorrt":
        yield f"the backend {config.backend} ignores CUDA graphs; they are TensorRT's"
    if cuda.graph_spec and not cuda.graphs:
        yield "graph_spec has no effect without graphs: true"
    for spec in cuda.graph_spec:
        where, bound = f"graph_spec of batch {spec.batch_size}", spec.graph_lower_bound
        shapes = {name: list(shape.dim) for name, shape in spec.input.items()}
        yield from _shape_mistakes(config, where, spec.batch_size, shapes)
        if not 1 <= bound.batch_size <= spec.batch_size or bound.input != spec.input:
            yield f"{where}: graph_lower_bound needs a batch in 1..{spec.batch_size} and its very dims"


def _shape_mistakes(config, where, batch_size, shapes):
    """Of what must have concrete sizes for every input."""
    if not 1 <= batch_size <= config.max_batch_size:
        yield f"{where} is outside 1..max_batch_size ({config.max_batch_size})"
    declared = {tensor.name: list(tensor.dims) for tensor in config.input}
    if set(shapes) != set(declared):
        yield f"{where} must give exactly the inputs {', '.join(declared)}"
    for name in set(shapes) & set(declared):
        sizes, wanted = shapes[name], declared[name]
        if len(sizes) != len(wanted) or any(s < 1 or w not in (-1, s) for s, w in zip(sizes, wanted, strict=True)):
            yield f"{where}: {name} needs concrete dims without the batch that fit {wanted}"


def engine_mistakes(config, entry):
    """Mistakes in a model's config against the shapes of the engine it will run.

    Args:
        entry: the engine's manifest entry.
    """
    profiles, mistakes = entry["profiles"], []
    for index, profile in enumerate(profiles):
        if set(profile) != {tensor.name for tensor in config.input}:
            mistakes.append(f"profile {index} is for the inputs {', '.join(profile)}, the config's differ")
            continue
        for tensor in config.input:
            smallest, _, largest = profile[tensor.name]
            fixed = [size if size == other else -1 for size, other in zip(smallest[1:], largest[1:], strict=True)]
            if list(tensor.dims) != fixed:
                mistakes.append(f"dims {list(tensor.dims)} of {tensor.name} differ from the engine's {fixed}")
    for spec in config.optimization.cuda.graph_spec:
        shapes = {name: [spec.batch_size, *shape.dim] for name, shape in spec.input.items()}
        if not any(_within(shapes, profile) for profile in profiles):
            mistakes.append(f"the shapes {shapes} of a graph_spec are in no profile of the engine")
    wanted = [str(index) for index in range(len(profiles))] if config.backend == "tensorrt" else []
    if any(list(group.profile) != wanted for group in config.instance_group):
        mistakes.append(f"instance_group must have the profiles {wanted}")
    return mistakes


def _within(shapes, profile):
    return set(shapes) == set(profile) and all(
        smallest <= size <= largest
        for name, shape in shapes.items()
        for smallest, size, largest in zip(profile[name][0], shape, profile[name][2], strict=True)
    )


def file_mistakes(config, files):
    """Mistakes in the files beside a configuration that it names.

    Args:
        files: their content by name in the model's folder.
    """
    mistakes = []
    types = {tensor.name: tensor.data_type for tensor in config.input}
    for warmup in config.model_warmup:
        for tensor, given in warmup.inputs.items():
            name, width = f"{WARMUP}/{given.input_data_file}", _WIDTHS[DataType.Name(given.data_type)]
            size = len(files.get(name, b""))
            if size != width * int(np.prod(given.dims)) or given.data_type != types[tensor]:
                mistakes.append(f"{warmup.name}: {name} of {tensor} has {size} bytes, or another type")
    for tensor in config.output:
        count = len(files.get(tensor.label_filename, b"").splitlines())
        if tensor.label_filename and count != tensor.dims[0]:
            mistakes.append(f"{tensor.label_filename} has {count} lines, {tensor.dims[0]} classes")
    return mistakes
