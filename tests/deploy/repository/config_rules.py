"""What the configurations of component models must respect, found on a real server and in its backends' sources.

Triton ignores, stops at or crashes on what is named here. That every field is one that Triton knows, protobuf holds;
ensembles, warm-ups and labels, which are the same on every target, the real server (tests/deploy/server).
"""

import numpy as np

from rekd_deploy.repository.config import ENGINE


def component_mistakes(config):
    """Mistakes in the configuration of a model that runs a graph or an engine."""
    if not config.instance_group:
        yield "instance_group is missing; Triton would choose for itself"
    if any(not 1 <= size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size):
        yield "a preferred_batch_size is outside 1..max_batch_size"
    if {tensor.allow_ragged_batch for tensor in config.input} != {"pad_id" in config.parameters}:
        yield "allow_ragged_batch must go with pad_id: nothing else pads several lengths"
    runs_engine = config.backend == "tensorrt" or ENGINE in config.parameters
    if runs_engine and any(group.kind != group.KIND_GPU for group in config.instance_group):
        yield "an engine runs on a GPU only; instance_group must be KIND_GPU"
    warmed = [(each.batch_size, {n: given.dims for n, given in each.inputs.items()}) for each in config.model_warmup]
    specs = config.optimization.cuda.graph_spec
    wanted = {tensor.name: tensor.dims for tensor in config.input}
    for batch_size, shapes in [*warmed, *((spec.batch_size, _shapes(spec)) for spec in specs)]:
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
    profiles = entry["profiles"]
    for profile in profiles:
        for tensor in config.input:
            smallest, _, largest = profile[tensor.name]
            fixed = [size if size == other else -1 for size, other in zip(smallest[1:], largest[1:], strict=True)]
            if list(tensor.dims) != fixed:
                yield f"dims {list(tensor.dims)} of {tensor.name} differ from the engine's {fixed}"
        for spec in config.optimization.cuda.graph_spec:
            for name, dims in _shapes(spec).items():
                shape, (smallest, _, largest) = [spec.batch_size, *dims], profile[name]
                if list(np.clip(shape, smallest, largest)) != shape:
                    yield f"the shape {shape} of {name} in a graph_spec is outside a profile of the engine"
    wanted = [str(index) for index in range(len(profiles))] if config.backend == "tensorrt" else []
    if any(list(group.profile) != wanted for group in config.instance_group):
        yield f"instance_group must have the profiles {wanted}"
