"""What all modules of a repository know of its models: their names, their files, how they are served, config.pbtxt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekd_deploy.contract.signature import TensorSpec
from rekd_deploy.errors import RepositoryError
from rekd_train.errors import ConfigError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

SELECTOR, PREDICTOR, SINGLE, ENSEMBLE = "rekd_selector", "rekd_predictor", "rekd_single", "rekd"
GRAPH_MODELS = {"selector": SELECTOR, "predictor": PREDICTOR, "single": SINGLE}
"""The Triton model that runs each graph."""
COMPONENTS, MODELS = (SELECTOR, PREDICTOR), (SELECTOR, PREDICTOR, ENSEMBLE)
"""The models that keep earlier versions; those that are always there."""
ENDPOINTS = {"text": "rekd_text", "image": "rekd_image"}
"""The model that takes texts or image files as bytes."""
FORMER = ("rekd_prepare", "rekd_answer")
"""Steps that the endpoint had in older repositories."""

CONFIG_FILE, GRAPH, PLAN, WARMUP = "config.pbtxt", "model.onnx", "model.plan", "warmup"
MANIFEST, REFERENCE = "manifest.json", "parity.npz"
LABEL_FILE = "labels.txt"
"""The classes, one a line, for clients that request a classification from Triton."""

TARGETS = ("python", "onnxruntime", "tensorrt")
ENGINES = {"python": ("tensorrt-rtx",), "onnxruntime": (), "tensorrt": ("tensorrt",)}
"""Engines that each target can run; the plans of one product are not read by the other."""
THREADS, ENGINE, SHORTEST_LENGTH = "intra_op_thread_count", "engine", "shortest_length"
DATA_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8"}


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

    def __post_init__(self) -> None:
        least = {"max_batch_size": 1, "queue_delay_us": 0, "instances": 1, "threads": 0}
        mistakes = [
            f"{name} is {getattr(self, name)}; it must be at least {limit}"
            for name, limit in least.items() if getattr(self, name) < limit
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
    """The content of a config.pbtxt: fields in declaration order, parameters sorted by key."""
    from google.protobuf import text_format

    return text_format.MessageToString(config, as_utf8=True)


def read_config(path: Path) -> ModelConfig:
    """Parse a config.pbtxt; RepositoryError: missing, or not a model configuration."""
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


def parsed(content: Mapping[str, Any]) -> ModelConfig:
    """A configuration from its fields; what Triton does not know is an error of protobuf's."""
    from google.protobuf import json_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return json_format.ParseDict(content, ModelConfig())


def tensors(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """Inputs or outputs as a configuration declares them: without the batch axis, -1 where the length is free."""
    return [
        {"name": spec.name, "data_type": DATA_TYPES[spec.dtype],
         "dims": [axis if isinstance(axis, int) else -1 for axis in spec.shape[1:]]}
        for spec in specs
    ]  # fmt: skip


def step(model: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """A step of an ensemble, whose tensors keep their names."""
    maps = {"input_map": {each["name"]: each["name"] for each in inputs}}
    maps["output_map"] = {each["name"]: each["name"] for each in outputs}
    return {"model_name": model, "model_version": -1, **maps}


def strings(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Parameters as a configuration has them."""
    return {key: {"string_value": value} for key, value in parameters.items()}
