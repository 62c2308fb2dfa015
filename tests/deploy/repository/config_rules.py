"""What the configurations that exports write must respect, found on a real server and in the sources of its backends.

Triton ignores, stops at or crashes on what is named here. Every function returns the list of mistakes. That every field
is one that Triton knows, protobuf holds.
"""

from __future__ import annotations

import numpy as np
from tritonclient.grpc.model_config_pb2 import DataType

from rekd_deploy.repository.config import ENGINE, LABEL_FILE, WARMUP

_WIDTHS = {"TYPE_INT64": 8, "TYPE_FP32": 4, "TYPE_BOOL": 1, "TYPE_UINT8": 1}
"""Bytes of an element."""


def config_mistakes(configs, files=None):
    """Mistakes in a repository's configurations, by model name, and in the files that they name, by path."""
    mistakes = []
    for name, config in configs.items():
        own = _ensemble_mistakes(config, configs) if config.platform == "ensemble" else _component_mistakes(config)
        own = [*own, *(_file_mistakes(config, files) if files is not None else ())]
        mistakes += [f"{name}: {mistake}" for mistake in own]
    return mistakes


def _ensemble_mistakes(config, configs):
    known, used = {tensor.name: _type(tensor) for tensor in config.input}, set()
    for step in config.ensemble_scheduling.step:
        model = configs[step.model_name]
        served = model.version_policy.specific.versions
        if served and step.model_version not in served:
            yield f"step {model.name} runs version {step.model_version}, which is not served"
        if config.max_batch_size > model.max_batch_size:
            yield f"max_batch_size {config.max_batch_size} is above that of {model.name}"
        sources = {step.input_map[tensor.name]: _type(tensor) for tensor in model.input}
        yield from (f"step {model.name}: nothing gives {s} before it" for s in sources.items() - known.items())
        used |= set(sources)
        made = {step.output_map[each.name]: _type(each) for each in model.output if each.name in step.output_map}
        yield from (f"{name} is produced twice" for name in made.keys() & known.keys())
        known |= made
    public = {tensor.name: _type(tensor) for tensor in config.output}
    yield from (f"output {tensor} is not what a step gives" for tensor in public.items() - known.items())
    yield from (f"{name} is used by nothing" for name in known.keys() - used - public.keys())
    yield from (
        f"{name} is an output and feeds a later step: Triton deadlocks when only some outputs are requested"
        for name in public.keys() & used
    )


def _type(tensor):
    return tensor.data_type, tuple(tensor.dims)


def _component_mistakes(config):
    if not config.instance_group:
        yield "instance_group is missing; Triton would choose for itself"
    if any(not 1 <= size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size):
        yield "a preferred_batch_size is outside 1..max_batch_size"
    runs_graph = config.backend != "python" or "max_length" in config.parameters  # not a step that takes rows singly
    if runs_graph and {tensor.allow_ragged_batch for tensor in config.input} != {"pad_id" in config.parameters}:
        yield "allow_ragged_batch must go with pad_id: nothing else pads several lengths"
    runs_engine = config.backend == "tensorrt" or ENGINE in config.parameters
    if runs_engine and any(group.kind != group.KIND_GPU for group in config.instance_group):
        yield "an engine runs on a GPU only; instance_group must be KIND_GPU"
    warmed = [(each.batch_size, {n: given.dims for n, given in each.inputs.items()}) for each in config.model_warmup]
    specs = config.optimization.cuda.graph_spec
    for batch_size, shapes in [*warmed, *((spec.batch_size, _shapes(spec)) for spec in specs)]:
        wanted = {tensor.name: tensor.dims for tensor in config.input}
        if not 1 <= batch_size <= config.max_batch_size or shapes.keys() != wanted.keys() or any(
            size < 1 or axis not in (-1, size)
            for name in wanted for size, axis in zip(shapes[name], wanted[name], strict=True)
        ):
            yield f"{shapes} in batches of {batch_size} are not concrete sizes that fit {wanted}"
    for spec in specs:
        bound = spec.graph_lower_bound
        if not 1 <= bound.batch_size <= spec.batch_size or bound.input != spec.input:
            yield f"graph_lower_bound needs a batch in 1..{spec.batch_size} and its very dims"


def _shapes(spec):
    return {name: list(shape.dim) for name, shape in spec.input.items()}


def engine_mistakes(config, entry):
    """Mistakes in a model's config against the shapes of the engine with this manifest entry, which it will run."""
    profiles, mistakes = entry["profiles"], []
    for profile in profiles:
        for tensor in config.input:
            smallest, _, largest = profile[tensor.name]
            fixed = [size if size == other else -1 for size, other in zip(smallest[1:], largest[1:], strict=True)]
            if list(tensor.dims) != fixed:
                mistakes.append(f"dims {list(tensor.dims)} of {tensor.name} differ from the engine's {fixed}")
        for spec in config.optimization.cuda.graph_spec:
            for name, dims in _shapes(spec).items():
                shape, (smallest, _, largest) = [spec.batch_size, *dims], profile[name]
                if list(np.clip(shape, smallest, largest)) != shape:
                    mistakes.append(f"the shape {shape} of {name} in a graph_spec is outside a profile of the engine")
    wanted = [str(index) for index in range(len(profiles))] if config.backend == "tensorrt" else []
    if any(list(group.profile) != wanted for group in config.instance_group):
        mistakes.append(f"instance_group must have the profiles {wanted}")
    return mistakes


def _file_mistakes(config, files):
    types = {tensor.name: tensor.data_type for tensor in config.input}
    for warmup in config.model_warmup:
        for tensor, given in warmup.inputs.items():
            content = files.get(f"{config.name}/{WARMUP}/{given.input_data_file}", b"")
            size = _WIDTHS[DataType.Name(given.data_type)] * int(np.prod(given.dims))
            if len(content) != size or given.data_type != types[tensor]:
                yield f"{warmup.name}: the file of {tensor} has {len(content)} bytes, or another type"
    for tensor in config.output:
        count = len(files.get(f"{config.name}/{LABEL_FILE}", b"").splitlines())
        if tensor.label_filename and (tensor.label_filename, count) != (LABEL_FILE, tensor.dims[0]):
            yield f"{tensor.label_filename} has {count} lines, {tensor.dims[0]} classes"
