"""What the configuration of a component model says of its GPUs: which, with TF32 or not, which CUDA graphs;
and whether an engine takes it.

Each key is one that the backends read, in releases 24.10 to 26.06: docs/serving.md names the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.repository.warmups import lengths_of
from rekd_train.inputs.preprocessors import Preprocessor

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig


def place_on_gpu(config: ModelConfig, gpus: Sequence[int], engine: Mapping[str, Any] | None) -> None:
    """One instance group on these GPUs; with the names of an engine's profiles, all of which Triton may choose."""
    from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

    for group in config.instance_group:
        group.kind = ModelInstanceGroup.KIND_GPU
        group.gpus.extend(gpus)
        if engine is not None:
            group.profile.extend(map(str, range(len(engine["profiles"]))))


def without_tf32(config: ModelConfig) -> None:
    """fp32 products as the gate has proved them: the onnxruntime backend hands this to its CUDA provider."""
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
    accelerator.parameters["use_tf32"] = "0"


def capture(
    config: ModelConfig,
    signature: GraphSignature,
    preprocessor: Preprocessor,
    batch_sizes: Sequence[int],
    engine: Mapping[str, Any],
) -> None:
    """CUDA graphs of a TensorRT engine, launched as one where a request has their shape.

    With one profile there is a graph for each padded length and batch size. It also serves the batches between the size
    below and its own: the rows that are not there are what the last batch left in the buffers, and are thrown away. The
    length must be exact, since rows that are shorter would be read at the wrong places.

    The backend tries every specification on every profile, and one outside is an error in its log. So with several
    profiles there is none: then the backend captures each profile at the lengths that it is tuned for.
    """
    config.optimization.cuda.graphs = True
    if len(engine["profiles"]) > 1:
        return
    for length in lengths_of(signature, preprocessor):
        for below, size in zip([0, *batch_sizes], batch_sizes, strict=False):
            spec = config.optimization.cuda.graph_spec.add(batch_size=size)
            spec.graph_lower_bound.batch_size = below + 1
            for shapes in (spec.input, spec.graph_lower_bound.input):
                for tensor in signature.inputs:
                    shapes[tensor.name].dim.extend(signature.sizes_at(tensor, length)[1:])


def engine_mistakes(config: ModelConfig, entry: Mapping[str, Any]) -> list[str]:
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


def _within(shapes: Mapping[str, list[int]], profile: Mapping[str, Any]) -> bool:
    return set(shapes) == set(profile) and all(
        smallest <= size <= largest
        for name, shape in shapes.items()
        for smallest, size, largest in zip(profile[name][0], shape, profile[name][2], strict=True)
    )
