"""What the configuration of one model that runs something must respect; the rules of ``config_rules``, continued.

Found on a real server and in the sources of Triton's backends: what is named here would be ignored without a word, stop
the server, or crash it.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from rekd_deploy.repository.config import (
    ARENA,
    ENGINE,
    EXECUTION_MODE,
    INTER_THREADS,
    MAX_LENGTH,
    MEMORY_PATTERN,
    PAD_ID,
    SHRINKAGE,
    THREADS,
    parameters_of,
)
from rekd_deploy.repository.config_gpu import without_tf32

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelWarmup

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


def member_mistakes(config: ModelConfig) -> list[str]:
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


def _group_mistakes(group: ModelInstanceGroup) -> list[str]:
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


def _optimisation_mistakes(config: ModelConfig) -> list[str]:
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


def _accelerator_mistakes(config: ModelConfig) -> list[str]:
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


def _warmup_mistakes(config: ModelConfig, warmup: ModelWarmup) -> list[str]:
    from tritonclient.grpc.model_config_pb2 import DataType

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


def _is_one_of(dims: list[int], declared: list[int]) -> bool:
    """Whether concrete dims fit those of the configuration."""
    return len(dims) == len(declared) and all(
        size >= 1 and wanted in (-1, size) for size, wanted in zip(dims, declared, strict=True)
    )
