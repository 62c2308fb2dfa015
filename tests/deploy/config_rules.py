"""What the configurations that exports write must respect, found on a real server and in the sources of its backends.

Triton ignores, stops at or crashes on what is named here. Every function returns the list of mistakes.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from tritonclient.grpc.model_config_pb2 import DataType

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

SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_DESCRIPTION = {LABELS, PREPROCESSING, TOKENIZER, FINGERPRINT, VERSION}
KNOWN_PARAMETERS = {
    "python": {THREADS, MAX_LENGTH, VOCABULARY_SIZE, PAD_ID, ENGINE, STEP, *_DESCRIPTION},
    "onnxruntime": {THREADS, INTER_THREADS, EXECUTION_MODE, ARENA, MEMORY_PATTERN, SHRINKAGE, *_DESCRIPTION},
    "tensorrt": _DESCRIPTION,
    "ensemble": _DESCRIPTION,
}
"""Triton ignores an unknown key without a word, so a misspelt one would have no effect."""
_GRAPH_LEVELS = (-1, 0, 1, 2)
"""What the onnxruntime backend knows: basic, all, extended, none; it takes any other for all."""
_VALUES = {
    THREADS: (r"\d{1,4}", "a whole number, 0 or more"),
    INTER_THREADS: (r"\d{1,4}", "a whole number, 0 or more"),
    EXECUTION_MODE: ("[01]", "0 or 1"),
    ARENA: ("[01]", "0 or 1"),
    MEMORY_PATTERN: ("[01]", "0 or 1"),
    PAD_ID: (r"\d{1,9}", "a token id"),
    SHRINKAGE: (r"(cpu|gpu):\d+(;(cpu|gpu):\d+)*", "devices like cpu:0 or cpu:0;gpu:0"),
}
"""Parameters that are numbers in disguise: the pattern, in words."""
_MUST_BE_SEEN = ("attention_mask", "keep", "kept")
"""A row of zeros in one of these is an empty input."""
_WIDTHS = {"TYPE_INT64": 8, "TYPE_FP32": 4, "TYPE_BOOL": 1, "TYPE_UINT8": 1}
"""Bytes of an element."""


def config_mistakes(configs):
    """Mistakes in a repository's configurations, by model name."""
    mistakes = []
    for name, config in configs.items():
        if config.name != name:
            mistakes.append(f"{name}: the config is named '{config.name}'; folder and name must be equal")
        mistakes += [f"{name}: {mistake}" for mistake in _common_mistakes(config)]
        if config.platform == "ensemble":
            mistakes += [f"{name}: {mistake}" for mistake in _ensemble_mistakes(config, configs)]
        else:
            mistakes += [f"{name}: {mistake}" for mistake in component_mistakes(config)]
    return mistakes


def _common_mistakes(config):
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


def _ensemble_mistakes(config, configs):
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
    produced_by_steps = set()
    used = set()
    for step in config.ensemble_scheduling.step:
        component = configs.get(step.model_name)
        if component is None:
            mistakes.append(f"step {step.model_name} is not in this repository")
            continue
        if step.model_version == 0:
            mistakes.append(f"step {step.model_name}: model_version must be written (-1: the latest)")
        served = component.version_policy.specific.versions
        if step.model_version > 0 and served and step.model_version not in served:
            mistakes.append(
                f"step {step.model_name} runs version {step.model_version}, but {', '.join(map(str, served))} is served"
            )
        if config.max_batch_size > component.max_batch_size:
            mistakes.append(
                f"max_batch_size {config.max_batch_size} is above {component.max_batch_size} of {step.model_name}"
            )
        if set(step.input_map) != {tensor.name for tensor in component.input}:
            mistakes.append(f"step {step.model_name}: input_map must name every input of the model and nothing else")
        for tensor in component.input:
            source = step.input_map.get(tensor.name)
            used.add(source)
            if source is not None and source not in tensors:
                mistakes.append(f"step {step.model_name}: nothing before it produces {source}")
            elif source is not None and not _fits(tensors[source], tensor):
                mistakes.append(f"step {step.model_name}: {source} does not have the type and dims of {tensor.name}")
        outputs = {tensor.name: tensor for tensor in component.output}
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


def _fits(given, wanted):
    return given.data_type == wanted.data_type and list(given.dims) == list(wanted.dims)


def component_mistakes(config):
    """Mistakes in the configuration of a model that is no ensemble."""
    mistakes = []
    if not config.instance_group:
        mistakes.append("instance_group is missing; Triton would choose for itself")
    for group in config.instance_group:
        mistakes += _group_mistakes(group)
    if config.HasField("sequence_batching"):
        mistakes.append("sequence_batching is not allowed; requests do not depend on each other")
    for size in config.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= config.max_batch_size:
            mistakes.append(f"preferred_batch_size {size} is outside 1..max_batch_size ({config.max_batch_size})")
    for tensor in config.input:
        for field in ("optional", "is_shape_tensor"):
            if getattr(tensor, field):
                mistakes.append(f"{field} of {tensor.name} is not allowed; the graph takes whole, padded batches")
        runs_graph = config.backend != "python" or MAX_LENGTH in config.parameters  # not a step that takes rows singly
        if runs_graph and tensor.allow_ragged_batch != (PAD_ID in config.parameters):
            mistakes.append(
                f"allow_ragged_batch of {tensor.name} is {tensor.allow_ragged_batch}; every input needs it with the "
                f"parameter {PAD_ID}, and none without: nothing else pads requests of several lengths"
            )
    if config.default_model_filename or config.cc_model_filenames:
        mistakes.append("the file of the model must have its usual name")
    for key, value in parameters_of(config).items():
        pattern, words = _VALUES.get(key, (".*", ""))
        if not re.fullmatch(pattern, value, re.DOTALL):
            mistakes.append(f"{key} '{value}' must be {words}")
    if (config.backend == "tensorrt" or ENGINE in config.parameters) and any(
        group.kind != group.KIND_GPU for group in config.instance_group
    ):
        mistakes.append("an engine runs on a GPU only; instance_group must be KIND_GPU")
    mistakes += _optimisation_mistakes(config)
    names = Counter(warmup.name for warmup in config.model_warmup)
    mistakes += [f"warm-up {name} is there twice" for name, count in names.items() if count > 1]
    for warmup in config.model_warmup:
        mistakes += _warmup_mistakes(config, warmup)
    return mistakes


def _group_mistakes(group):
    mistakes = []
    if group.count < 1 or group.kind not in (group.KIND_CPU, group.KIND_GPU):
        mistakes.append("instance_group must have a count of at least 1 and KIND_CPU or KIND_GPU")
    if group.gpus and group.kind != group.KIND_GPU:
        mistakes.append("instance_group names GPUs, but is not KIND_GPU")
    if len(set(group.gpus)) != len(group.gpus) or any(gpu < 0 for gpu in group.gpus):
        mistakes.append(f"instance_group: gpus {list(group.gpus)} must be 0 or more and differ")
    if group.profile and group.kind != group.KIND_GPU:
        mistakes.append("instance_group names profiles of an engine, but is not KIND_GPU")
    if group.passive:
        mistakes.append("instance_group is passive and would answer nothing")
    for resource in group.rate_limiter.resources:
        if not resource.name or resource.count < 1:
            mistakes.append("a resource of rate_limiter must have a name and a count of at least 1")
    return mistakes


def _optimisation_mistakes(config):
    optimisation, mistakes = config.optimization, []
    if optimisation.graph.level not in _GRAPH_LEVELS:
        mistakes.append(f"graph level {optimisation.graph.level} is none of {_GRAPH_LEVELS} and would be ignored")
    if optimisation.HasField("graph") and config.backend != "onnxruntime":
        mistakes.append(f"the backend {config.backend} ignores a graph level")
    mistakes += _accelerator_mistakes(config)
    if optimisation.cuda.graphs and config.backend != "tensorrt":
        mistakes.append(f"the backend {config.backend} ignores CUDA graphs; they are TensorRT's")
    if optimisation.cuda.graph_spec and not optimisation.cuda.graphs:
        mistakes.append("graph_spec has no effect without graphs: true")
    declared = {tensor.name: list(tensor.dims) for tensor in config.input}
    for spec in optimisation.cuda.graph_spec:
        where = f"graph_spec of batch {spec.batch_size}"
        if not 1 <= spec.batch_size <= config.max_batch_size:
            mistakes.append(f"{where} is outside 1..max_batch_size ({config.max_batch_size})")
        if set(spec.input) != set(declared):
            mistakes.append(f"{where} must give exactly the inputs {', '.join(declared)}")
            continue
        for name, shape in spec.input.items():
            if not _is_one_of(list(shape.dim), declared[name]):
                mistakes.append(f"{where}: {name} needs concrete dims without the batch that fit {declared[name]}")
        if spec.HasField("graph_lower_bound"):
            bound, size = spec.graph_lower_bound, spec.batch_size
            if not 1 <= bound.batch_size <= size:
                mistakes.append(f"{where}: graph_lower_bound of batch {bound.batch_size} is outside 1..{size}")
            if bound.input != spec.input:
                mistakes.append(f"{where}: graph_lower_bound needs its very dims; shorter rows would be read as others")
    return mistakes


def _accelerator_mistakes(config):
    """Of execution_accelerators: the CUDA provider without TF32 where it runs fp32, nothing else anywhere."""
    given = config.optimization.execution_accelerators
    if config.backend != "onnxruntime" or all(group.kind != group.KIND_GPU for group in config.instance_group):
        if config.optimization.HasField("execution_accelerators"):
            return ["execution_accelerators are not allowed; precision and fusion are in the graph"]
        return []
    wanted = type(config)()
    without_tf32(wanted)
    if given != wanted.optimization.execution_accelerators:
        return ["execution_accelerators must be cuda with use_tf32 0 alone, else it answers otherwise than was proved"]
    return []


def _warmup_mistakes(config, warmup):
    declared = {tensor.name: tensor for tensor in config.input}
    where, mistakes = f"warm-up {warmup.name}", []
    if not 1 <= warmup.batch_size <= config.max_batch_size:
        mistakes.append(f"{where}: batch_size {warmup.batch_size} is outside 1..{config.max_batch_size}")
    if set(warmup.inputs) != set(declared):
        mistakes.append(f"{where} must give exactly the inputs {', '.join(declared)}")
    for name, given in warmup.inputs.items():
        tensor = declared.get(name)
        if tensor is None:
            continue
        if given.data_type != tensor.data_type or not _is_one_of(list(given.dims), list(tensor.dims)):
            mistakes.append(f"{where}: {name} needs the input's type and concrete dims without the batch")
        kind = given.WhichOneof("input_data_type")
        if kind is None:
            mistakes.append(f"{where}: {name} has no data")
        if kind == "random_data" and tensor.data_type != DataType.Value("TYPE_FP32"):
            mistakes.append(f"{where}: random_data for {name} draws any value; use a file under warmup/")
        if kind == "zero_data" and name in _MUST_BE_SEEN:
            mistakes.append(f"{where}: zero_data for {name} is an empty input; use a file under warmup/")
        if kind == "input_data_file" and not re.fullmatch(r"[\w.-]+", given.input_data_file):
            mistakes.append(f"{where}: '{given.input_data_file}' is no name of a file in warmup/")
    return mistakes


def _is_one_of(dims, declared):
    """Whether concrete dims fit those of the configuration."""
    return len(dims) == len(declared) and all(
        size >= 1 and wanted in (-1, size) for size, wanted in zip(dims, declared, strict=True)
    )


def engine_mistakes(config, entry):
    """Mistakes in a model's config against the shapes of the engine it will run.

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
    for spec in config.optimization.cuda.graph_spec:
        shapes = {name: [spec.batch_size, *shape.dim] for name, shape in spec.input.items()}
        if not any(_within(shapes, profile) for profile in profiles):
            mistakes.append(f"{config.name}: the shapes {shapes} of a graph_spec are in no profile of the engine")
    most = max((shapes[2][0] for profile in profiles for shapes in profile.values()), default=0)
    if config.max_batch_size > most:
        mistakes.append(f"{config.name}: max_batch_size {config.max_batch_size} is above the engine's {most}")
    if config.backend == "tensorrt":
        wanted = [str(index) for index in range(len(profiles))]
        for group in config.instance_group:
            if list(group.profile) != wanted:
                mistakes.append(f"{config.name}: instance_group has the profiles {list(group.profile)}, not {wanted}")
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
    for warmup in config.model_warmup:
        for tensor, given in warmup.inputs.items():
            name, wanted = f"{WARMUP}/{given.input_data_file}", _WIDTHS[DataType.Name(given.data_type)]
            size = len(files.get(name, b""))
            if size != wanted * int(np.prod(given.dims)):
                mistakes.append(f"{config.name}: {warmup.name}: {name} of {tensor} has {size} bytes")
    for tensor in config.output:
        count = len(files.get(tensor.label_filename, b"").splitlines())
        if tensor.label_filename and count != tensor.dims[0]:
            mistakes.append(f"{config.name}: {tensor.label_filename} has {count} lines, {tensor.dims[0]} classes")
    return mistakes
