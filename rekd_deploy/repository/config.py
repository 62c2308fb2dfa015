"""What all modules of a repository know of config.pbtxt: names, settings, reading, writing, whether a graph fits it.

Built in ``rekd_deploy.repository.build``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rekd_deploy.errors import RepositoryError
from rekd_train.errors import ConfigError

if TYPE_CHECKING:
    import onnx
    from tritonclient.grpc.model_config_pb2 import ModelConfig

SELECTOR = "rekd_selector"
PREDICTOR = "rekd_predictor"
SINGLE = "rekd_single"
ENSEMBLE = "rekd"
CONFIG_FILE = "config.pbtxt"
TARGETS = ("python", "onnxruntime", "tensorrt")
ENGINES = {"python": ("tensorrt-rtx",), "onnxruntime": (), "tensorrt": ("tensorrt",)}
"""Engines that each target can run; the plans of one product are not read by the other."""
LABEL_FILE = "labels.txt"
"""The classes, one a line, for clients that request a classification from Triton."""
RESOURCE = "rekd"
"""What an execution takes one of, where executions are limited."""
THREADS, MAX_LENGTH, VOCABULARY_SIZE, ENGINE = "intra_op_thread_count", "max_length", "vocabulary_size", "engine"
PAD_ID = "pad_id"
"""What the python backend's model fills short texts up with when it joins them with longer ones."""
INTER_THREADS, EXECUTION_MODE = "inter_op_thread_count", "execution_mode"
ARENA, MEMORY_PATTERN = "enable_mem_arena", "enable_mem_pattern"

NEWEST_IR, NEWEST_OPSET = 10, 21
"""Of the file format and the operators that Triton 24.10's ONNX Runtime (1.19) reads."""
_ONNX_TYPES = {"TYPE_INT64": 7, "TYPE_FP32": 1, "TYPE_BOOL": 9, "TYPE_FP16": 10, "TYPE_INT32": 6, "TYPE_UINT8": 2}


@dataclass(frozen=True)
class ServingSettings:
    """How the server runs the component models."""

    max_batch_size: int = 64
    """Most items in one request and in one dynamic batch."""
    preferred_batch_sizes: tuple[int, ...] = (8, 16, 32, 64)
    """Batch sizes the scheduler aims at; those above max_batch_size are left out."""
    queue_delay_us: int = 0
    """Microseconds a request may wait for others to form a preferred batch."""
    instances: int = 1
    """Processes of each component model."""
    threads: int = 0
    """Threads of each process inside one operation; 0: the instances share the cores."""
    gpu: bool = False
    """Whether ONNX Runtime runs on GPUs; engines always do."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to run on, each with all instances; empty: every one that is there."""
    rate_limit: bool = False
    """Whether each execution takes one of the server's resource 'rekd'."""
    warm_up: bool = True
    """Whether every padded length (on GPUs every batch size, too) has run before a model calls itself ready."""

    def __post_init__(self) -> None:
        least = {"max_batch_size": 1, "queue_delay_us": 0, "instances": 1, "threads": 0}
        mistakes = [
            f"{name} is {getattr(self, name)}; it must be at least {limit}"
            for name, limit in least.items()
            if getattr(self, name) < limit
        ]
        if len(set(self.gpus)) != len(self.gpus) or any(number < 0 for number in self.gpus):
            mistakes.append(f"gpus {self.gpus} must be 0 or more, each once")
        if any(size < 1 for size in self.preferred_batch_sizes):
            mistakes.append(f"preferred_batch_sizes {self.preferred_batch_sizes} must all be at least 1")
        if mistakes:
            raise ConfigError("; ".join(mistakes))

    @property
    def preferred(self) -> list[int]:
        """The batch sizes that the scheduler aims at."""
        return [size for size in self.preferred_batch_sizes if size <= self.max_batch_size]


def config_text(config: ModelConfig) -> str:
    """The file content: fields in declaration order, parameters sorted by key."""
    from google.protobuf import text_format

    return text_format.MessageToString(config, as_utf8=True)


def read_config(path: Path) -> ModelConfig:
    """Parse a config.pbtxt.

    Raises:
        RepositoryError: missing, or not a model configuration.
    """
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(Path(path).read_text(encoding="utf-8"), ModelConfig())
    except FileNotFoundError:
        raise RepositoryError(f"{path} is missing; fix: write the repository again with rekd-export") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path} is not a Triton model configuration: {error}") from None


def parameters_of(config: ModelConfig) -> dict[str, str]:
    """The parameters as a plain dictionary."""
    return {key: value.string_value for key, value in config.parameters.items()}


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


def _onnx_type(data_type: int) -> int | None:
    from tritonclient.grpc.model_config_pb2 import DataType

    return _ONNX_TYPES.get(DataType.Name(data_type))
