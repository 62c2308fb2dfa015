"""What the configuration of a member says of the GPUs that it runs on: which, with TF32 or not, which CUDA graphs.

Each key is one that the backends read, in releases 24.10 and 26.05: src/onnxruntime.cc of Triton's onnxruntime_backend,
src/instance_state.cc of its tensorrt_backend.
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
